"""What a user reads when the hub gives nothing: its answers are simulated below the libraries that ask it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from alignbench.errors import CheckpointError
from alignbench.hub import refusal
from alignbench.policies.flux import FluxPolicy
from alignbench.policies.lora import read_lora
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from alignbench.policies.unet import StableDiffusionXLPolicy
from alignbench.rewards.checkpoints import weights_file
from alignbench.rewards.geneval.detectors.mask2former import Mask2FormerDetector
from alignbench.rewards.text_image import ClipScore, PickScore

NAME = "someone/nothing-here"
PLACES: dict[str, Callable[[], Any]] = {
    "flux": lambda: FluxPolicy.from_pretrained(NAME),
    "sdxl": lambda: StableDiffusionXLPolicy.from_pretrained(NAME),
    "random weights": lambda: StableDiffusion3Policy.from_pretrained(NAME, weights="random"),
    "lora": lambda: read_lora(NAME, FluxPolicy, NAME),
    "pickscore": lambda: PickScore(NAME),
    "mask2former": lambda: Mask2FormerDetector(NAME),
    "file of weights": lambda: weights_file(f"{NAME}/HPS_v2.1.pt"),
    "open_clip folder": lambda: ClipScore(f"hf-hub:{NAME}", None, name="clipscore"),
    "open_clip tag": lambda: ClipScore("ViT-L-14-quickgelu", "openai", name="clipscore"),
}
GATED = "gated: accept its terms on its page of huggingface.co, then log in with hf auth login or set HF_TOKEN"
ANSWERS = {
    "gated, without a token": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Please log in."}, GATED),
    "gated, with a token": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not on the list."}, GATED),
    "no such repository": (
        401,
        {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."},
        "the hub has no such repository, or it is private: check the name",
    ),
    "no network": (None, {}, "not in the local cache and the hub cannot be reached: download it where there is a net"),
}


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int | None, dict[str, str]], None]]:
    """Lets the hub answer every request with a status and headers; None is no network. Nothing is in the cache."""
    http = sys.modules[type(huggingface_hub.get_session()).__module__.partition(".")[0]]  # httpx, or its successor
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def answering(status: int | None, headers: dict[str, str]) -> None:
        def handle(request: Any) -> Any:
            if status is None:
                raise http.ConnectError("[Errno 101] Network is unreachable", request=request)
            return http.Response(status, headers=headers, request=request)

        huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(handle)))

    yield answering
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("place", PLACES)
def test_what_the_hub_refuses_is_said_with_what_helps(
    answer: Callable[[int | None, dict[str, str]], None], place: str, case: str
) -> None:
    status, headers, sentence = ANSWERS[case]
    answer(status, headers)
    with pytest.raises(CheckpointError) as raised:
        PLACES[place]()
    assert sentence in str(raised.value)
    assert ("ViT-L-14-quickgelu" if place == "open_clip tag" else NAME) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_revision_and_a_file_that_are_not_there(answer: Callable[[int | None, dict[str, str]], None]) -> None:
    answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id: v9"})
    with pytest.raises(CheckpointError, match=r"its repository has no such revision"):
        FluxPolicy.from_pretrained(NAME, revision="v9")
    answer(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "not there"})
    with pytest.raises(CheckpointError, match=r"HPS\.pt: .*its repository has no such file"):
        weights_file(f"{NAME}/HPS.pt")


def test_other_errors_speak_for_themselves() -> None:
    assert refusal(OSError("a disk\nof which  little is known.")) == "a disk of which little is known"
    assert refusal(KeyError()) == "KeyError"
    assert refusal(KeyError("weight_map")) == "KeyError: 'weight_map'"
    assert refusal(RuntimeError("size mismatch " * 100)).endswith(" ...")
