// Packs documents into rows of tokens, first-fit-decreasing. Host-only: numpy arrays in and out, no tensors.
// lape_fast/text/packing.py holds the same algorithm in Python: its reference, its fallback and its test oracle.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// A run of one document's tokens that fits into a row. A continued piece repeats the last token of the one before it.
struct Piece {
  std::int64_t start;
  std::int64_t length;
  std::int32_t language;
  bool continued;
};

struct Placement {
  std::int64_t row;
  std::int64_t column;
};

std::vector<Piece> cut(const std::int64_t* lengths, const std::int32_t* languages, std::int64_t documents,
                       std::int64_t context) {
  std::vector<Piece> pieces;
  std::int64_t start = 0;
  for (std::int64_t document = 0; document < documents; ++document) {
    const std::int64_t end = start + lengths[document];
    // No sum of a position and a context that has no bound.
    for (std::int64_t from = start; from < end; from += std::min(context - 1, end - from)) {
      const std::int64_t length = std::min(context, end - from);
      // What a piece repeats is never all it has, or an earlier one would have ended the document.
      if (from > start && length == 1) break;
      pieces.push_back({from, length, languages[document], from > start});
    }
    start = end;
  }
  return pieces;
}

// The free space of every row, in a tree of maxima: finds the first row with room in O(log n).
class FreeSpace {
 public:
  FreeSpace(std::size_t rows, std::int64_t context) : leaves_(1) {
    while (leaves_ < rows) leaves_ *= 2;
    free_.assign(2 * leaves_, context);
  }

  // Takes `length` tokens from the first row that has them, and returns the row.
  std::int64_t take(std::int64_t length) {
    std::size_t node = 1;
    while (node < leaves_) node = free_[2 * node] >= length ? 2 * node : 2 * node + 1;
    const auto row = static_cast<std::int64_t>(node - leaves_);
    free_[node] -= length;
    for (node /= 2; node > 0; node /= 2) free_[node] = std::max(free_[2 * node], free_[2 * node + 1]);
    return row;
  }

 private:
  std::size_t leaves_;
  std::vector<std::int64_t> free_;
};

// Finds a row for every piece, the longest first and equally long ones in the order of the documents, then orders each
// row by language: the counting kernels add to memory where the language changes. Returns the row count.
std::int64_t place(const std::vector<Piece>& pieces, std::int64_t context, bool one_per_row,
                   std::vector<Placement>& placements) {
  std::vector<std::size_t> order(pieces.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return pieces[a].length > pieces[b].length; });
  placements.resize(pieces.size());
  std::int64_t rows = 0;
  FreeSpace free(one_per_row ? 1 : pieces.size(), context);
  for (const std::size_t piece : order) {
    if (one_per_row) {
      placements[piece] = {rows++, 0};
      continue;
    }
    const std::int64_t row = free.take(pieces[piece].length);
    placements[piece] = {row, 0};
    rows = std::max(rows, row + 1);
  }
  if (one_per_row) return rows;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::pair(placements[a].row, pieces[a].language) < std::pair(placements[b].row, pieces[b].language);
  });
  for (std::size_t place = 1; place < order.size(); ++place) {
    const Placement& before = placements[order[place - 1]];
    Placement& here = placements[order[place]];
    if (here.row == before.row) here.column = before.column + pieces[order[place - 1]].length;
  }
  return rows;
}

void require(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

void check(const Array<std::int32_t>& tokens, const Array<std::int64_t>& lengths,
           const Array<std::int32_t>& languages, std::int64_t context, const Array<std::int32_t>& special_ids) {
  require(tokens.ndim() == 1 && lengths.ndim() == 1 && languages.ndim() == 1 && special_ids.ndim() == 1,
          "tokens, lengths, languages and special_ids must have one dimension each");
  const auto aligned = [](const py::array& values) {
    return (values.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
  };
  require(aligned(tokens) && aligned(lengths) && aligned(languages) && aligned(special_ids),
          "tokens, lengths, languages and special_ids must not begin at an address that is no multiple of their size");
  require(context >= 2, "context_length is " + std::to_string(context) + ", but must be at least 2");
  require(lengths.size() == languages.size(), std::to_string(lengths.size()) + " lengths do not match " +
                                                  std::to_string(languages.size()) + " languages");
  std::int64_t left = tokens.size();
  for (py::ssize_t document = 0; document < lengths.size(); ++document) {
    const std::int64_t length = lengths.data()[document];
    require(length >= 0 && length <= left, "the length " + std::to_string(length) + " of document " +
                                               std::to_string(document) + " is negative or beyond the tokens");
    left -= length;
    require(languages.data()[document] >= -1, "the language " + std::to_string(languages.data()[document]) +
                                                  " of document " + std::to_string(document) + " is below -1");
  }
  require(left == 0, std::to_string(left) + " tokens belong to no document");
  for (const auto* ids : {&tokens, &special_ids}) {
    const auto* smallest = std::min_element(ids->data(), ids->data() + ids->size());
    require(ids->size() == 0 || *smallest >= 0,
            "token ids must not be negative, but one is " + std::to_string(ids->size() ? *smallest : 0));
  }
}

py::tuple pack_documents(const Array<std::int32_t>& tokens, const Array<std::int64_t>& lengths,
                         const Array<std::int32_t>& languages, std::int64_t context, std::int64_t pad_id,
                         const Array<std::int32_t>& special_ids, bool one_per_row) {
  check(tokens, lengths, languages, context, special_ids);
  const std::int32_t* token = tokens.data();
  std::vector<Piece> pieces;
  std::vector<Placement> placements;
  std::vector<bool> special;
  std::int64_t rows = 0;
  std::int64_t width = context;
  // Under the interpreter's lock: once it is open, another thread may change the lengths that were checked.
  pieces = cut(lengths.data(), languages.data(), lengths.size(), context);
  {
    py::gil_scoped_release unlocked;
    rows = place(pieces, context, one_per_row, placements);
    if (one_per_row) {
      width = 0;
      for (const Piece& piece : pieces) width = std::max(width, piece.length);
    }
    for (py::ssize_t id = 0; id < special_ids.size(); ++id) {
      const auto value = static_cast<std::size_t>(special_ids.data()[id]);
      if (value >= special.size()) special.resize(value + 1);
      special[value] = true;
    }
  }
  // Otherwise the bytes of the arrays would overflow before numpy could say that there is no such memory.
  require(width <= std::numeric_limits<std::int64_t>::max() / 8 / std::max<std::int64_t>(rows, 1),
          "context_length is " + std::to_string(context) + ", but no memory holds " + std::to_string(rows) +
              " rows of so many tokens");
  py::array_t<std::int64_t> input_ids({rows, width});
  py::array_t<std::int64_t> position_ids({rows, width});
  py::array_t<std::int32_t> language_ids({rows, width});
  std::int64_t* input = input_ids.mutable_data();
  std::int64_t* position = position_ids.mutable_data();
  std::int32_t* language = language_ids.mutable_data();
  {
    py::gil_scoped_release unlocked;
    std::fill(input, input + rows * width, pad_id);
    std::fill(position, position + rows * width, 0);
    std::fill(language, language + rows * width, -1);
    for (std::size_t piece = 0; piece < pieces.size(); ++piece) {
      const Piece& from = pieces[piece];
      const std::int64_t to = placements[piece].row * width + placements[piece].column;
      for (std::int64_t step = 0; step < from.length; ++step) {
        const std::int32_t id = token[from.start + step];
        const bool repeated = step == 0 && from.continued;
        const bool uncounted = repeated || (static_cast<std::size_t>(id) < special.size() && special[id]);
        input[to + step] = id;
        position[to + step] = step;
        language[to + step] = uncounted ? -1 : from.language;
      }
    }
  }
  return py::make_tuple(input_ids, position_ids, language_ids);
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host-only helpers of lape_fast, without tensors.";
  module.def("pack_documents", &pack_documents, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(),
             py::arg("languages").noconvert(), py::arg("context_length"), py::arg("pad_id"),
             py::arg("special_ids").noconvert(), py::arg("one_document_per_row"),
             "Packs documents into rows; returns input_ids, position_ids (int64) and language_ids (int32), [R, S].");
}
