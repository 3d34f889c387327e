"""Every error that lape_fast raises on purpose: a full sentence with the offending value and the fix."""

# Characters of a message. It quotes what it complains about, and a hostile file can hold a name of any length.
LONGEST_MESSAGE = 2000


class LapeFastError(Exception):
    """Base of all errors raised by lape_fast; the command line prints it as one sentence, without a traceback.

    What a message quotes cannot write to the terminal: it is one line of printable characters.
    """

    def __str__(self) -> str:
        # KeyError would print the repr of the message, with quotes around a full sentence.
        words = " ".join(str(part) for part in self.args).split()
        text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in " ".join(words))
        half = LONGEST_MESSAGE // 2
        return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


class BackendError(LapeFastError, RuntimeError):
    """A backend was asked for that cannot run here (missing extension, no GPU, unknown name)."""


class ShapeError(LapeFastError, ValueError):
    """A tensor has the wrong shape, dtype, device or index range for an op or a file."""


class ArchitectureError(LapeFastError, ValueError):
    """The model's feed-forward layout is not in the table, or the model is not what a file was made for."""


class CorpusError(LapeFastError, ValueError):
    """A corpus is missing, empty, undecodable or lacks a language."""


class DamagedFileError(CorpusError):
    """A text file is cut off, undecodable or not in its format; a stream of documents can skip it."""


class LanguageError(LapeFastError, KeyError):
    """A language code is unknown, or absent from the file that was asked for it."""


class FileFormatError(LapeFastError, ValueError):
    """A file is not what its name or its metadata says, or cannot be read safely."""


class FileExistsAlreadyError(LapeFastError, FileExistsError):
    """An output would overwrite something that another run wrote."""


class AdapterError(LapeFastError, ValueError):
    """An adapter cannot be used as it was asked for: several at once, written into a quantised base, damaged values."""


class SelectionError(LapeFastError, ValueError):
    """Neurons cannot be selected from these counts with these thresholds."""


class TrainingError(LapeFastError, RuntimeError):
    """Training cannot start or continue."""


class ConfigError(LapeFastError, ValueError):
    """An option, or the YAML file that sets it, has a value that makes no sense."""


class WorkerError(LapeFastError, RuntimeError):
    """A process that helped this one ended without a result."""


class StoppedError(LapeFastError, RuntimeError):
    """A run was asked to stop; what it had done is saved."""
