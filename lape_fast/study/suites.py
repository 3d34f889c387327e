"""Suites of tasks by language: which task of lm-evaluation-harness measures what in which language.

Belebele, Global-MMLU, ARC and HellaSwag are the harness's own tasks, under its names. SIB-200 for every language and
translation between any two languages of FLORES-200 are not among them; their configurations stand here. None of this
imports the harness.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lape_fast.errors import ConfigError, LanguageError
from lape_fast.text import canonical, language_name, nearest

FLORES_200 = tuple(
    """
    ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn als_Latn amh_Ethi apc_Arab arb_Arab
    arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn
    ban_Latn bel_Cyrl bem_Latn ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn
    ceb_Latn ces_Latn cjk_Latn ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek
    eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn fao_Latn fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn
    gaz_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn
    hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kab_Latn kac_Latn kam_Latn
    kan_Knda kas_Arab kas_Deva kat_Geor kaz_Cyrl kbp_Latn kea_Latn khk_Cyrl khm_Khmr kik_Latn kin_Latn kir_Cyrl
    kmb_Latn kmr_Latn knc_Arab knc_Latn kon_Latn kor_Hang lao_Laoo lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn
    ltg_Latn ltz_Latn lua_Latn lug_Latn luo_Latn lus_Latn lvs_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Arab
    min_Latn mkd_Cyrl mlt_Latn mni_Beng mos_Latn mri_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva nso_Latn
    nus_Latn nya_Latn oci_Latn ory_Orya pag_Latn pan_Guru pap_Latn pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn
    prs_Arab quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Olck scn_Latn shn_Mymr sin_Sinh slk_Latn
    slv_Latn smo_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn
    swh_Latn szl_Latn tam_Taml taq_Latn taq_Tfng tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi tpi_Latn
    tsn_Latn tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl umb_Latn urd_Arab uzn_Latn
    vec_Latn vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr yor_Latn yue_Hant zho_Hans zho_Hant zsm_Latn zul_Latn
    """.split()  # noqa: SIM905
)
BELEBELE = tuple(
    """
    acm_Arab afr_Latn als_Latn amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng azj_Latn
    bam_Latn ben_Beng ben_Latn bod_Tibt bul_Cyrl cat_Latn ceb_Latn ces_Latn ckb_Arab dan_Latn deu_Latn ell_Grek
    eng_Latn est_Latn eus_Latn fin_Latn fra_Latn fuv_Latn gaz_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr
    hin_Deva hin_Latn hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan
    kac_Latn kan_Knda kat_Geor kaz_Cyrl kea_Latn khk_Cyrl khm_Khmr kin_Latn kir_Cyrl kor_Hang lao_Laoo lin_Latn
    lit_Latn lug_Latn luo_Latn lvs_Latn mal_Mlym mar_Deva mkd_Cyrl mlt_Latn mri_Latn mya_Mymr nld_Latn nob_Latn
    npi_Deva npi_Latn nso_Latn nya_Latn ory_Orya pan_Guru pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn ron_Latn
    rus_Cyrl shn_Mymr sin_Latn sin_Sinh slk_Latn slv_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn srp_Cyrl
    ssw_Latn sun_Latn swe_Latn swh_Latn tam_Taml tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi tsn_Latn tso_Latn
    tur_Latn ukr_Cyrl urd_Arab urd_Latn uzn_Latn vie_Latn war_Latn wol_Latn xho_Latn yor_Latn zho_Hans zho_Hant
    zsm_Latn zul_Latn
    """.split()  # noqa: SIM905
)
# The rest go by short codes, which Wikipedia and BCP 47 share.
GLOBAL_MMLU = (
    "am ar bn cs de el en es fa fil fr ha he hi id ig it ja ko ky lt mg ms ne nl ny pl pt ro ru si sn so sr sv sw te "
    "tr uk vi yo zh"
)
OKAPI = "ar bn ca da de es eu fr gu hi hr hu hy id it kn ml mr ne nl pt ro ru sk sr sv ta te uk vi"
# Of the second translation of ARC, the languages that the first lacks.
ARC_MT = "el fi is nb pl"

TOPICS = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")

ENGLISH = "eng_Latn"

# Suite -> language -> the names of its tasks.
SUITES: dict[str, dict[str, tuple[str, ...]]] = {
    # Galician is another team's.
    "belebele": {code: (f"belebele_{code}",) for code in (*BELEBELE, "glg_Latn")},
    "sib200": {code: (f"sib200_{code}",) for code in (*FLORES_200, "nqo_Nkoo")},
    "global_mmlu": {canonical(code): (f"global_mmlu_full_{code}",) for code in GLOBAL_MMLU.split()},
    "arc": {
        ENGLISH: ("arc_challenge",),
        **{canonical(code): (f"arc_{code}",) for code in (*OKAPI.split(), "zh")},
        **{canonical(code): (f"arc_challenge_mt_{code}",) for code in ARC_MT.split()},
    },
    "hellaswag": {
        ENGLISH: ("hellaswag",),
        "ary_Arab": ("darijahellaswag",),
        "arz_Arab": ("egyhellaswag",),
        **{canonical(code): (f"hellaswag_{code}",) for code in OKAPI.split()},
    },
    # Into the language and out of it.
    "flores": {
        code: (f"flores_{ENGLISH}-{code}", f"flores_{code}-{ENGLISH}") for code in FLORES_200 if code != ENGLISH
    },
}

_CODE = r"[a-z]{3}_[A-Z][a-z]{3}"
_TRANSLATION = re.compile(rf"flores_(?P<source>{_CODE})-(?P<target>{_CODE})")
_TOPIC = re.compile(rf"sib200_(?P<language>{_CODE})")


@dataclass(frozen=True)
class NamedTask:
    """A task by its name, and the canonical code of its language where that is known."""

    name: str
    language: str | None = None


def expand_tasks(tasks: Sequence[str], languages: Sequence[str] | None = None) -> list[NamedTask]:
    """The tasks that suites have in some languages; any other name stands for itself.

    Args:
        tasks: suites (the keys of ``SUITES``) and names of tasks of the harness or of a folder.
        languages: codes in any style, for the suites.

    Raises:
        ConfigError: a suite without languages, or no task.
        LanguageError: a suite has no task in a language.

    Example:
        >>> expand_tasks(["belebele", "piqa"], ["mt"])
        [NamedTask(name='belebele_mlt_Latn', language='mlt_Latn'), NamedTask(name='piqa', language=None)]
    """
    known = {name: code for suite in SUITES.values() for code, names in suite.items() for name in names}
    codes = [canonical(code) for code in languages or ()]
    found = []
    for task in tasks:
        if task not in SUITES:
            found.append(NamedTask(task, known.get(task)))
            continue
        if not codes:
            raise ConfigError(
                f"The suite {task} has tasks in {len(SUITES[task])} languages; say which with --languages, as in "
                "--languages mlt_Latn,afr_Latn."
            )
        found += [NamedTask(name, code) for code in codes for name in _tasks_in(task, code)]
    if not found:
        raise ConfigError(f"No task was named; choose among {', '.join(SUITES)} and the names that the harness has.")
    return list(dict.fromkeys(found))


def own_task(name: str) -> dict[str, Any] | None:
    """The harness's configuration of a task that only lape_fast has; None where the name is no such task.

    ``sib200_mlt_Latn`` chooses the topic of a sentence, ``flores_eng_Latn-mlt_Latn`` translates from the first language
    into the second. The data are ``Davlan/sib200`` and ``mteb/flores`` (FLORES-200, a column per language) on the hub.

    Example:
        >>> own_task("flores_eng_Latn-mlt_Latn")["doc_to_text"]
        'English: {{eng_Latn}}\\nMaltese:'
    """
    topic = _TOPIC.fullmatch(name)
    if topic and topic["language"] in SUITES["sib200"]:
        return _topic_task(name, topic["language"])
    pair = _TRANSLATION.fullmatch(name)
    if pair and {pair["source"], pair["target"]} <= set(FLORES_200):
        return _translation_task(name, pair["source"], pair["target"])
    return None


def _tasks_in(suite: str, language: str) -> tuple[str, ...]:
    if language not in SUITES[suite]:
        near = nearest(language, SUITES[suite])
        hint = f"; the nearest it has {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""
        raise LanguageError(f"The suite {suite} has no task in {language} ({language_name(language)}){hint}.")
    return SUITES[suite][language]


def _topic_task(name: str, language: str) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "Davlan/sib200",
        "dataset_name": language,
        "output_type": "multiple_choice",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": f"Text: {{{{text}}}}\nOne of {', '.join(TOPICS[:-1])} or {TOPICS[-1]}.\nTopic:",
        "doc_to_choice": list(TOPICS),
        "doc_to_target": "category",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def _translation_task(name: str, source: str, target: str) -> dict[str, Any]:
    metrics = [{"metric": each, "aggregation": each, "higher_is_better": True} for each in ("bleu", "chrf", "chrf++")]
    return {
        "task": name,
        "dataset_path": "mteb/flores",
        "output_type": "generate_until",
        "validation_split": "dev",
        "fewshot_split": "dev",
        "test_split": "devtest",
        "doc_to_text": f"{language_name(source)}: {{{{{source}}}}}\n{language_name(target)}:",
        "doc_to_target": f"{{{{{target}}}}}",
        # Scripts that a tokenizer hardly knows take several tokens a character.
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 512},
        "metric_list": metrics,
        "metadata": {"version": 1},
    }
