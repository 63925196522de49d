"""GenEval's prompts for photographic models: its 553 test prompts, and training prompts of the same grammar.

GenEval: Ghosh et al. 2023 (arXiv 2310.11513). A training prompt never says what a test prompt says, in other words or
another order either ("A and B", "B and A"; "A left of B", "B right of A"), as in Flow-GRPO (arXiv 2505.05470). All 80
single objects are test prompts, so there are none to train on.
"""

from functools import cache

from alignbench.prompts.prompt import Prompt
from alignbench.rewards.geneval import suite
from alignbench.rewards.geneval.rules import Record
from alignbench.seeding import seed_of
from alignbench.shapes.captions import meaning

TEST_SEED, TEST_DRAWS = 43, 100  # of the benchmark
SEED, DRAWS = 1, 5_000  # of each tag, for training and tuning; repetitions are left out
TUNING_SHARE = 20  # one meaning of twenty is for tuning


def split(name: str) -> list[Prompt]:
    """The prompts of ``train``, ``tuning``, ``test`` or ``all``, with ids such as ``"geneval/test/00012"``.

    No two splits share a meaning. ``test`` is the benchmark's, in its order. The metadata is the record.
    """
    names = ("train", "tuning", "test") if name == "all" else (name,)
    return [
        Prompt(f"geneval/{each}/{number:05d}", record["prompt"], record)
        for each in names
        for number, record in enumerate(_records()[each])
    ]


@cache
def _records() -> dict[str, list[Record]]:
    test = suite.generate(TEST_SEED, TEST_DRAWS)
    taken = {meaning(record) for record in test}
    found: dict[str, list[Record]] = {"train": [], "tuning": [], "test": test}
    for record in suite.generate(SEED, DRAWS):
        said = meaning(record)
        if said not in taken:
            tuning = seed_of("geneval split", *sorted(map(str, said))) % TUNING_SHARE == 0
            found["tuning" if tuning else "train"].append(record)
    return found
