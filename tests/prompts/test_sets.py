"""Prompt sets: what is read, and how an iteration draws."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from alignbench.errors import ConfigError, DataError
from alignbench.prompts import sets
from alignbench.prompts.prompt import Prompt
from tests.conftest import CONF


def test_files_keep_order_text_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    record = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
    path.write_text(json.dumps(record) + '\n{"prompt": "a dog"}\n')
    assert sets.load("file", path=str(path)) == [
        Prompt("mine/00000", "a photo of a circle", record),
        Prompt("mine/00001", "a dog", {}),
    ]
    (tmp_path / "mine.txt").write_text("a cat\n  a dog \n")
    assert [prompt.text for prompt in sets.load("file", path=str(tmp_path / "mine.txt"))] == ["a cat", "a dog"]


def test_drawing_is_distinct_repeatable_and_balanced_over_tags() -> None:
    prompts = [Prompt(f"a/{i}", f"a{i}", {"tag": "a"}) for i in range(90)] + [
        Prompt(f"b/{i}", f"b{i}", {"tag": "b"}) for i in range(10)
    ]
    drawn = [sets.draw(prompts, 4, seed=0, iteration=i) for i in range(300)]
    assert drawn[7] == sets.draw(prompts, 4, seed=0, iteration=7)
    assert drawn[7] != sets.draw(prompts, 4, seed=1, iteration=7)
    assert all(len({prompt.id for prompt in each}) == 4 for each in drawn)
    share = Counter(prompt.metadata["tag"] for each in drawn for prompt in each)["b"] / 1200
    assert 0.4 < share < 0.55  # half by tag, a tenth by count; without replacement a little below half
    uniform = [sets.draw(prompts, 4, 0, i, balance="none") for i in range(300)]
    assert Counter(p.metadata["tag"] for each in uniform for p in each)["b"] / 1200 < 0.2


def test_weights_give_each_tag_its_share() -> None:
    """A draw of one prompt, so that nothing is without replacement: 7 : 5 : 0 over tags of 2, 50 and 10 prompts."""
    sizes = {"position": 2, "counting": 50, "single_object": 10}
    prompts = [Prompt(f"{tag}/{i}", f"{tag}{i}", {"tag": tag}) for tag, size in sizes.items() for i in range(size)]
    weights = {"position": 7.0, "counting": 5.0, "single_object": 0.0}
    chances = sets.probabilities(prompts, 1, weights)
    by_tag = {
        tag: sum(p for p, each in zip(chances, prompts, strict=True) if each.metadata["tag"] == tag) for tag in sizes
    }
    assert by_tag == pytest.approx({"position": 7 / 12, "counting": 5 / 12, "single_object": 0})
    drawn = [sets.draw(prompts, 1, 0, iteration, weights)[0].metadata["tag"] for iteration in range(600)]
    assert Counter(drawn)["position"] / 600 == pytest.approx(7 / 12, abs=0.05)
    assert "single_object" not in drawn
    with pytest.raises(ConfigError, match="needs 53 distinct prompts but the set has 52"):
        sets.draw(prompts, 53, 0, 0, weights)


@pytest.mark.parametrize(
    "weights",
    [{"a": 1.0}, {"a": 1.0, "b": -1.0}, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0, "typo": 2.0}],
    ids=["a tag left out", "negative", "all zero", "a tag that no prompt has"],
)
def test_weights_that_do_not_fit_the_tags(weights: dict[str, float]) -> None:
    prompts = [Prompt(f"{tag}/0", tag, {"tag": tag}) for tag in ("a", "b")]
    with pytest.raises(ConfigError, match=r"prompts.balance is .* for every tag of the prompts \(a, b\)"):
        sets.probabilities(prompts, 1, weights)


def test_a_weight_of_zero_may_name_a_tag_that_is_not_there() -> None:
    prompts = [Prompt(f"{tag}/0", tag, {"tag": tag}) for tag in ("a", "b")]
    assert sets.probabilities(prompts, 1, {"a": 3.0, "b": 1.0, "single_object": 0.0}).tolist() == [0.75, 0.25]


def test_the_published_mixture_of_genevals_tags() -> None:
    """Flow-GRPO's: position : counting : color_attr : colors : two_object = 7 : 5 : 3 : 1 : 1, no single objects."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        balance = OmegaConf.to_container(compose("config", ["model=sd35_medium", "prompts=geneval"]).prompts.balance)
    prompts = sets.load("geneval", "train")
    chances = sets.probabilities(prompts, 48, balance)  # type: ignore[arg-type]
    shares: Counter[str] = Counter()
    for prompt, chance in zip(prompts, chances, strict=True):
        shares[prompt.metadata["tag"]] += chance  # type: ignore[assignment]
    expected = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert dict(shares) == pytest.approx({tag: weight / 17 for tag, weight in expected.items()})


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match="choose shapes, geneval, file or dataset"):
        sets.load("web")


def test_train_and_test_captions_share_no_held_out_combination() -> None:
    train, test = sets.load("shapes", "train"), sets.load("shapes", "test")
    unseen = {prompt.text for prompt in test if not prompt.metadata["seen"]}
    assert unseen
    assert not unseen & {prompt.text for prompt in train}


def test_genevals_test_prompts_are_the_benchmarks_and_nobody_trains_on_what_they_say() -> None:
    train, tuning, test = (sets.load("geneval", split) for split in ("train", "tuning", "test"))
    assert len(test) == 553
    assert Counter(prompt.metadata["tag"] for prompt in test) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip
    assert test[0].id == "geneval/test/00000"

    def content(prompt: Prompt) -> frozenset[str]:  # independent of word order within a list of things
        words = prompt.text.removeprefix("a photo of ")
        for relation, turned in (("right of", "left of"), ("below", "above")):
            if f" {relation} " in words:
                a, b = words.split(f" {relation} ")
                words = f"{b} {turned} {a}"
        return frozenset(words.split(" and "))

    sides = [{content(prompt) for prompt in split} for split in (train, tuning, test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    texts = [prompt.text for prompt in train]
    assert len(texts) == len(set(texts)) > 12_000
    assert 0.03 < len(tuning) / len(train) < 0.08
    by_tag = Counter(prompt.metadata["tag"] for prompt in train)
    assert set(by_tag) == {"two_object", "counting", "colors", "position", "color_attr"}
    assert by_tag["counting"] > 100  # of 240
    assert len(sets.load("geneval", "all")) == len(train) + len(tuning) + len(test)


def test_genevals_prompts_are_those_of_photographic_models() -> None:
    from hydra import compose, initialize_config_dir

    from alignbench import assembly
    from tests.conftest import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in (["model=sd35_medium"], ["prompts=geneval"]):
            assert len(assembly.evaluated_prompts(compose("config", overrides))) == 553


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A data set on disk with two splits; one of the test captions is a training caption too."""
    import datasets

    train = {"caption": ["a cat", "a dog", "a cat", "", None, " a fish ", "x" * 3000], "kind": ["pet"] * 7}
    test = {"caption": ["a bird", "a dog"], "kind": ["wild", "pet"]}
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict(d) for name, d in (("fit", train), ("eval", test))})
    both.save_to_disk(tmp_path / "captions")
    return tmp_path / "captions"


COLUMNS = {
    "column": "caption", "tag": None, "splits": {"train": "fit", "test": "eval"}, "files": None, "revision": None
}  # fmt: skip


def test_data_sets_give_distinct_prompts_and_disjoint_splits(saved: Path) -> None:
    train = sets.load("dataset", "train", str(saved), COLUMNS)
    assert train == [Prompt("captions/train/0000000", "a cat"), Prompt("captions/train/0000005", "a fish")]
    test = sets.load("dataset", "test", str(saved), COLUMNS | {"tag": "kind"})
    assert test == [
        Prompt("captions/test/0000000", "a bird", {"tag": "wild"}),
        Prompt("captions/test/0000001", "a dog", {"tag": "pet"}),
    ]
    assert [prompt.text for prompt in sets.load("dataset", "all", str(saved), COLUMNS)] == [
        "a bird", "a dog", "a cat", "a fish"
    ]  # fmt: skip


def test_data_files_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps([{"prompt": "a cat"}, {"prompt": "a dog"}]))
    (folder / "test.json").write_text(json.dumps([{"prompt": "a bird"}]))
    (folder / "other.json").write_text(json.dumps([{"no": 1}]))
    columns = COLUMNS | {
        "column": "prompt",
        "splits": {"train": "train", "test": "test"},
        "files": {"train": "train.json", "test": "test.json"},
    }
    assert [prompt.text for prompt in sets.load("dataset", "train", str(folder), columns)] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("columns", "split", "error", "message"),
    [
        ({"column": "text"}, "train", DataError, "has no column 'text'; it has caption, kind"),
        ({"tag": "style"}, "test", DataError, "has no column 'style'"),
        ({"splits": {"train": "learn"}}, "train", DataError, "with the split 'learn'"),
        ({"splits": {"test": "eval"}}, "train", ConfigError, "has no prompts for train, only for test"),
        ({"splits": {"validation": "eval"}}, "train", ConfigError, "give some of train, tuning and test"),
        ({"colunm": "caption"}, "train", ConfigError, "prompts.dataset has no setting 'colunm'. Did you mean 'column'"),
    ],
)
def test_data_sets_that_cannot_be_used(
    saved: Path, columns: dict[str, object], split: sets.Split, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        sets.load("dataset", split, str(saved), COLUMNS | columns)
    assert message in str(raised.value)


def test_a_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read as a data set with the split 'fit'"):
        sets.load("dataset", "train", str(tmp_path / "nowhere"), COLUMNS | {"splits": {"train": "fit"}})


def test_foreign_folders_that_are_broken(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ``datasets`` raises: one sentence that names the folder or the file."""
    import os

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def refused(folder: Path, message: str, split: str = "train") -> None:
        with pytest.raises(DataError, match=message):
            sets.load("dataset", "train", str(folder), COLUMNS | {"tag": None, "splits": {"train": split}})

    def folder(name: str, content: bytes) -> Path:
        made = tmp_path / name.replace(".", "_")
        made.mkdir()
        (made / name).write_bytes(content)
        return made

    datasets.Dataset.from_dict({"caption": ["a cat"] * 500}).to_parquet(tmp_path / "good.parquet")
    content = (tmp_path / "good.parquet").read_bytes()
    refused(
        folder("train.parquet", content[:-40]), "train_parquet/train.parquet: cannot be read as a data set .*footer"
    )
    refused(folder("middle.parquet", content[:10] + bytes(40) + content[50:]), "middle_parquet: cannot be read")
    for name, damaged, reason in (
        ("train.jsonl", b'{"caption": "a"}\n{"caption":', "JSON parse error"),
        ("train.csv", b"caption\na\n1,2,3\n\xff", "Expected 1 fields"),
    ):
        refused(folder(name, damaged), f"{name.replace('.', '_')}: cannot be read as a data set .*{reason}")
    marker = tmp_path / "ran"
    script = f"open({str(marker)!r}, 'w')\n".encode()
    refused(folder("script.py", script).rename(tmp_path / "script"), "script.py: a data-set script is never run")
    refused(tmp_path / "script" / "script.py", "script.py: a data-set script is never run")
    assert not marker.exists()
    for name, damage in {
        "dataset_dict.json": b"[]",
        "fit/state.json": b'{"_data_files": 3}',
        "fit/dataset_info.json": b"[" * 5000,
        "fit/data-00000-of-00001.arrow": b"ARROW1",
    }.items():
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(damage)
        refused(saved, "captions: (cannot be read as a data set|its rows cannot be read)", "fit")
        (saved / name).write_bytes(whole)
    os.mkfifo(saved / "fit" / "pipe.arrow")
    refused(saved, r"pipe\.arrow: expected a regular file", "fit")


def test_files_of_another_split() -> None:
    with pytest.raises(ConfigError, match="files names no file of the split 'eval': add it, or set files=null"):
        sets.load("dataset", "test", "x", COLUMNS | {"files": {"fit": "train.json"}})


@pytest.mark.parametrize("name", ["pickapic", "hpdv2", "parti_prompts", "drawbench"])
def test_the_prompts_of_published_data_sets_are_read_from_a_folder_of_their_layout(name: str, tmp_path: Path) -> None:
    """Their columns and splits, as their cards state them, in a folder made here; nothing is downloaded."""
    import datasets
    import yaml

    from tests.conftest import CONF

    layouts = {
        "pickapic": (("train", "validation_unique", "test_unique"), {"caption": ["a", "b"], "label_0": [0.0, 1.0]}),
        "hpdv2": (("train", "test"), {"prompt": ["a", "b"], "image_path": ["x.jpg", "y.jpg"]}),
        "parti_prompts": (("train",), {"Prompt": ["a", "b"], "Category": ["Animals", "Arts"]}),
        "drawbench": (("train",), {"Prompts": ["a", "b"], "Category": ["Colors", "Counting"]}),
    }
    splits, columns = layouts[name]
    for number, split in enumerate(splits):
        texts = {key: [f"{value} {number}" if value in ("a", "b") else value for value in values]
                 for key, values in columns.items()}  # fmt: skip
        (tmp_path / f"{split}.json").write_text(json.dumps(datasets.Dataset.from_dict(texts).to_list()))
    group = yaml.safe_load((CONF / "prompts" / f"{name}.yaml").read_text())
    if group["dataset"]["files"] is None:
        both = {split: datasets.load_dataset("json", data_files=str(tmp_path / f"{split}.json"), split="train")
                for split in splits}  # fmt: skip
        datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "saved" if group["dataset"]["files"] is None else tmp_path
    for ours in group["dataset"]["splits"]:
        prompts = sets.load("dataset", ours, str(folder), group["dataset"])
        assert len(prompts) == 2
        assert bool(prompts[0].metadata) == (group["dataset"]["tag"] is not None)
