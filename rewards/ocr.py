"""Does the image show the text that the prompt puts in quotes? (the OCR reward of Flow-GRPO, arXiv 2505.05470)"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, nearest, one_line, to_uint8

Lines = list[tuple[str, float]]
Recogniser = Callable[[np.ndarray], Lines]
"""(H, W, 3) uint8 RGB -> recognised lines, each with a confidence in [0, 1] or more."""

_QUOTED = re.compile(r'["“”]([^"“”]*)["“”]')
_PACKAGES = {"rapidocr": "rapidocr_onnxruntime", "paddleocr": "paddleocr", "tesseract": "pytesseract"}
_INSTALL = (
    "pip install 'flow-align[ocr]' (brings rapidocr and its models), or paddleocr with paddlepaddle, "
    "or pytesseract with the program tesseract"
)


def quoted_text(prompt: str) -> str | None:
    """The text between the first pair of double quotes, straight or curly; None where there is no pair."""
    found = _QUOTED.search(prompt)
    return found[1] if found else None


def ocr_score(recognised: str, target: str, substring_ok: bool = True) -> float:
    """1 - d / len(target) in [0, 1], with d the edit distance, at most len(target), without case and white space.

    substring_ok: further text costs nothing where the target itself is found, as in Flow-GRPO; a policy can exploit it
    by writing more. NaN for an empty target.
    """
    found, wanted = _plain(recognised), _plain(target)
    if not wanted:
        return float("nan")
    if substring_ok and wanted in found:
        return 1.0
    return 1.0 - min(edit_distance(found, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements of one character."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


class OCRReward(Reward):
    """How much of the asked text an OCR program reads in the image, in [0, 1].

    The asked text is the metadata's `text`, else what stands between the first pair of double quotes of the prompt. A
    prompt without it, an empty one, and an image the program fails on have no score; `info["text"]` holds what was
    read. Another program, and the same on another device, may read differently: compare scores of one only.
    """

    name = "ocr"

    def __init__(self, engine: str | None = None, language: str | None = None, substring_ok: bool = True) -> None:
        """engine: rapidocr, paddleocr or tesseract (default: the first that is installed); language: a code of that
        engine (default: English); substring_ok: see `ocr_score`.
        """
        if engine is not None and engine not in _PACKAGES:
            known = ", ".join(_PACKAGES)
            raise RewardError(f"engine '{engine}' must be one of {known}{nearest(engine, _PACKAGES)}")
        if language is not None and engine in (None, "rapidocr"):
            raise RewardError("language needs engine: paddleocr or tesseract, whose code it is")
        self.engine, self.language, self.substring_ok = engine, language, substring_ok
        self._recognise: Recogniser | None = None
        self._lock = threading.Lock()  # some of these programs must not run in two threads

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the program; it runs on the CPU. Raises: RewardError if none is installed or it cannot start."""
        engine = self.engine or next((name for name, module in _PACKAGES.items() if find_spec(module)), None)
        if engine is None:
            raise RewardError(f"reward '{self.name}' needs a program that reads text: {_INSTALL}")
        if find_spec(_PACKAGES[engine]) is None:
            raise RewardError(f"reward '{self.name}': {_PACKAGES[engine]} is not installed: {_INSTALL}")
        try:
            self._recognise = _STARTERS[engine](self.language)
        except Exception as error:
            raise RewardError(f"reward '{self.name}': {engine} cannot start ({one_line(error)})") from error

    def score(self, batch: RewardBatch) -> RewardOutput:
        if self._recognise is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        scores, texts, problems = torch.full((len(batch),), torch.nan), [""] * len(batch), [""] * len(batch)
        sound = batch.images.isfinite().flatten(1).all(dim=1).tolist()
        pixels = to_uint8(batch.images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        tried = failed = 0
        for i, target in enumerate(map(_target, batch.prompts, batch.metadata)):
            if target is None or not _plain(target) or not sound[i]:
                problems[i] = "the prompt has no text in double quotes" if sound[i] else "pixels are not finite"
                continue
            tried += 1
            try:
                with self._lock:
                    lines = self._recognise(pixels[i])
            except Exception as error:
                failed += 1
                problems[i] = one_line(error)
                continue
            texts[i] = " ".join(text for text, confidence in lines if confidence > 0)
            scores[i] = ocr_score(texts[i], target, self.substring_ok)
        if tried and failed == tried:
            raise RewardError(
                f"reward '{self.name}' could not read any of {tried} images: {next(filter(None, problems))}"
            )
        return RewardOutput(scores, info={"text": texts, "problem": problems})


def _target(prompt: str, metadata: Mapping[str, Any]) -> str | None:
    text = metadata.get("text")
    return text if isinstance(text, str) else quoted_text(prompt)


def _start_rapidocr(language: str | None) -> Recogniser:
    from rapidocr_onnxruntime import RapidOCR

    program = RapidOCR(intra_op_num_threads=torch.get_num_threads())  # else it takes every core
    return lambda image: [(text, float(sure)) for _, text, sure in program(_bgr(image))[0] or []]


def _start_paddleocr(language: str | None) -> Recogniser:
    from paddleocr import PaddleOCR

    if hasattr(PaddleOCR, "predict"):  # version 3
        program = PaddleOCR(
            lang=language or "en",
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
        )
        return lambda image: paddle_lines(program.predict(_bgr(image)))
    program = PaddleOCR(use_angle_cls=False, lang=language or "en", show_log=False)
    return lambda image: paddle_lines(program.ocr(_bgr(image), cls=False))


def paddle_lines(pages: Iterable[Any] | None) -> Lines:
    """Lines of PaddleOCR's answer: of version 2, [[box, (text, confidence)], ...] or None a page; of 3, a mapping."""
    lines: Lines = []
    for page in pages or []:
        if isinstance(page, Mapping):
            lines += [(str(t), float(c)) for t, c in zip(page["rec_texts"], page["rec_scores"], strict=True)]
        else:
            lines += [(str(text), float(sure)) for _, (text, sure) in page or []]
    return lines


def _start_tesseract(language: str | None) -> Recogniser:
    import pytesseract

    pytesseract.get_tesseract_version()  # the program itself is not part of the package

    def recognise(image: np.ndarray) -> Lines:
        # Page mode 11: text anywhere in a picture, instead of the columns of a page.
        found = pytesseract.image_to_data(
            Image.fromarray(image), lang=language or "eng", config="--psm 11", output_type=pytesseract.Output.DICT
        )
        return [(text, float(sure)) for text, sure in zip(found["text"], found["conf"], strict=True)]

    return recognise


def _bgr(image: np.ndarray) -> np.ndarray:
    """The order of channels of OpenCV."""
    return np.ascontiguousarray(image[..., ::-1])


_STARTERS: dict[str, Callable[[str | None], Recogniser]] = {
    "rapidocr": _start_rapidocr,
    "paddleocr": _start_paddleocr,
    "tesseract": _start_tesseract,
}
