"""A vision-language model behind an OpenAI-compatible endpoint as a reward: vLLM, SGLang, llama.cpp or a hosted one.

Two forms of judging. `yes_no` asks for one word and reads its probability (as ArtifactReward, arXiv 2601.03468); `score`
asks for a number and reads it from the answer.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, nearest, one_line, to_uint8
from rewards.preprocess import resize

if TYPE_CHECKING:
    import httpx

YES_NO_QUESTION = (
    'Does this image show exactly what the description "{prompt}" asks for: every object, attribute, number and '
    "relation? Answer with one word, Yes or No."
)
SCORE_QUESTION = (
    'Rate from 1 to 5 how well this image matches the description "{prompt}", in content and in quality. '
    'End your answer with "Final Score: x".'
)
_MODES = ("yes_no", "score")
_OUTPUTS = ("probability", "log_odds")
_RETRIED = frozenset({408, 429})  # and everything from 500 on
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_FINAL = re.compile(rf"final score\W*[:=>]\W*{_NUMBER}", re.IGNORECASE)
_NAMED = re.compile(rf"score\W*?[:=>][\s*\"']*{_NUMBER}", re.IGNORECASE)
_BARE = re.compile(rf"\s*{_NUMBER}\s*(?:/\s*\d+)?\s*\.?\s*")


def log_odds(top: Iterable[tuple[str, float]], first: str = "yes", second: str = "no") -> float:
    """log p(first) - log p(second) from the most probable tokens of one position and their log-probabilities.

    The probabilities of all surface forms of a word add up: "Yes", " yes", "YES,". A word that is not among the tokens
    has at most the probability of the least of them, which takes its place. NaN if neither is there.
    """
    tokens = [(_word(token), value) for token, value in top if math.isfinite(value)]
    found = [[value for word, value in tokens if word == wanted] for wanted in (first, second)]
    if not any(found):
        return float("nan")
    bound = min(value for _, value in tokens)
    yes, no = (_log_sum(values) if values else bound for values in found)
    return yes - no


def probability(odds: float) -> float:
    """p(first) / (p(first) + p(second)) of a log-odds: the logistic function. NaN stays NaN."""
    return 1 / (1 + math.exp(-odds)) if odds >= 0 or odds != odds else math.exp(odds) / (1 + math.exp(odds))


def parse_score(text: str, low: float, high: float, pattern: str | None = None) -> float:
    """The number an answer gives, NaN without one or outside [low, high].

    pattern: regular expression whose first group is a number; all its matches are averaged (aspects). Default: the last
    "Final Score: x", else the mean of all "... score: x" (also `<Score>x</Score>` and JSON), else an answer that is
    nothing but a number.
    """
    if pattern is not None:
        texts = [match[1] for match in re.finditer(pattern, text)]
    else:
        texts = _FINAL.findall(text)[-1:] or _NAMED.findall(text)
        if not texts and (bare := _BARE.fullmatch(text)):
            texts = [bare[1]]
    try:
        values = [float(found) for found in texts]
    except (TypeError, ValueError):
        return float("nan")
    if not values or not all(low <= value <= high for value in values):
        return float("nan")
    return sum(values) / len(values)


def _word(token: str) -> str:
    """A token without case, blanks, punctuation and the marks that tokenizers put for a blank."""
    return re.sub(r"[\W_Ġ▁]+", "", token).casefold()


def _log_sum(values: Sequence[float]) -> float:
    peak = max(values)
    return peak + math.log(sum(math.exp(value - peak) for value in values)) if peak > -math.inf else peak


class _NoAnswer(Exception):
    """A request brought nothing that can be read; the message says why."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class _Judgement(NamedTuple):
    """Of one image: its number, NaN without one; the answer's text; why there is no number."""

    value: float
    text: str = ""
    problem: str = ""
    answered: bool = True


class JudgeReward(Reward):
    """Asks a vision-language model about each image, several at a time; an image it fails on has no score.

    `yes_no`: the share of Yes (or of `good`) against No in [0, 1], or its log-odds; components "p_yes" and "log_odds",
    uncertainty 4 p (1 - p).
    `score`: the number in the answer, within `score_range`. Answers are in `info["answer"]`, reasons of missing scores
    in `info["problem"]`. If no image of a call gets an answer, RewardError tells the reason.
    """

    name = "judge"
    deterministic = False  # greedy decoding on a batching server moves probabilities by about 0.01

    def __init__(
        self,
        url: str = "http://localhost:8000/v1",
        model: str | None = None,
        token_env: str | None = None,
        mode: str = "yes_no",
        question: str | None = None,
        good: str | bool = "yes",
        output: str = "probability",
        clip: float = 6.0,
        score_range: Sequence[float] = (1, 5),
        rescale: bool = False,
        pattern: str | None = None,
        image_size: int | None = None,
        max_tokens: int | None = None,
        top_logprobs: int = 20,
        request: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_in_flight: int = 32,
    ) -> None:
        """url: up to and with /v1; model: as the server names it (default: the only one it serves);
        token_env: environment variable that holds the API key; mode: yes_no or score;
        question: the text after the image, `{prompt}` stands for its prompt; good: the answer that is rewarded, yes or no;
        output: probability or log_odds, the latter clipped to +-clip;
        score_range: lowest and highest number that counts; rescale: map it to [0, 1]; pattern: see `parse_score`;
        image_size: pixels of the longer side that is sent (default: as it is);
        max_tokens: of the answer (default: 1, or 512 with mode score); request: further fields of each request;
        timeout: seconds of one attempt; backoff: seconds before the first repetition, doubled each time.
        """
        if isinstance(good, bool):  # what YAML makes of a bare yes or no
            good = "yes" if good else "no"
        _check_choices(mode=(mode, _MODES), good=(good, ("yes", "no")), output=(output, _OUTPUTS))
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RewardError(f"url must be http://HOST:PORT/v1 or https://HOST/v1, got {url!r}")
        if parts.username or parts.password:
            raise RewardError("url must not hold a key: put it into an environment variable and name that by token_env")
        if len(score_range) != 2 or not score_range[0] < score_range[1]:
            raise RewardError(f"score_range must be [lowest, highest], got {list(score_range)}")
        if not clip > 0 or not timeout > 0 or backoff < 0 or retries < 0 or max_in_flight < 1 or top_logprobs < 2:
            raise RewardError("clip and timeout must be positive, backoff and retries not negative, max_in_flight 1 and "
                              "top_logprobs 2 or more")  # fmt: skip
        self.url, self.model, self.token_env = url.rstrip("/"), model, token_env
        self.mode, self.good, self.output, self.clip = mode, good, output, clip
        self.question = question or (YES_NO_QUESTION if mode == "yes_no" else SCORE_QUESTION)
        self.uses_prompt = "{prompt}" in self.question
        self.low, self.high, self.rescale, self.pattern = float(score_range[0]), float(score_range[1]), rescale, pattern
        self.image_size, self.top_logprobs = image_size, top_logprobs
        self.max_tokens = max_tokens or (1 if mode == "yes_no" else 512)
        self.request = dict(request or {})
        self.timeout, self.retries, self.backoff, self.max_in_flight = timeout, retries, backoff, max_in_flight
        self._client: httpx.Client | None = None

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Connect and ask what is served. Raises: RewardError if nothing answers, or not this model."""
        self._client = self._connect()
        try:
            answer = self._attempts("GET", "/models", None)
        except _NoAnswer as problem:
            if problem.status != 404:  # the list is not part of every such service
                raise self._error(f"cannot be used ({problem}): start it, or repair url or token_env") from None
            answer = {}
        entries = answer.get("data")
        served = (
            [str(e["id"]) for e in entries if isinstance(e, dict) and "id" in e] if isinstance(entries, list) else []
        )
        if self.model is None and len(served) != 1:
            raise self._error(f"needs the model's name: set model to {' or '.join(served) or 'what it serves'}")
        if self.model is not None and served and self.model not in served:
            raise self._error(
                f"does not serve '{self.model}'{nearest(self.model, served)}; it has {', '.join(served[:8])}"
            )
        self.model = self.model or served[0]

    def score(self, batch: RewardBatch) -> RewardOutput:
        if self._client is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        pictures = self._encoded(batch.images)
        with ThreadPoolExecutor(min(self.max_in_flight, max(1, len(batch)))) as pool:
            results = list(pool.map(self._judged, pictures, batch.prompts))
        lost = [
            result.problem for result, picture in zip(results, pictures, strict=True) if picture and not result.answered
        ]
        if lost and len(lost) == sum(map(bool, pictures)):
            raise self._error(f"answered for none of {len(batch)} images ({lost[0]})")
        values = torch.tensor([result.value for result in results], dtype=torch.float32)
        info = {"answer": [result.text for result in results], "problem": [result.problem for result in results]}
        if self.mode == "score":
            rescaled = (values - self.low) / (self.high - self.low)
            return RewardOutput(rescaled if self.rescale else values, {"parsed": values}, info=info)
        p_yes = torch.tensor([probability(result.value) for result in results], dtype=torch.float32)
        sign = 1.0 if self.good == "yes" else -1.0
        share = p_yes if self.good == "yes" else 1 - p_yes
        scores = share if self.output == "probability" else (sign * values).clamp(-self.clip, self.clip)
        doubt = 4 * p_yes * (1 - p_yes)  # 1 where it cannot decide, 0 where it is certain
        return RewardOutput(scores, {"p_yes": p_yes, "log_odds": values}, doubt, info=info)

    def _judged(self, picture: str, prompt: str) -> _Judgement:
        if not picture:
            return _Judgement(math.nan, problem="pixels are not finite")
        try:
            choice = _choice(self._attempts("POST", "/chat/completions", self._body(picture, prompt)))
            text = _text(choice)
            if self.mode == "score":
                value, lacks = parse_score(text, self.low, self.high, self.pattern), "no score in the answer"
            else:
                value, lacks = log_odds(_top(choice)), "neither yes nor no among the likely tokens of the answer"
        except _NoAnswer as problem:
            return _Judgement(math.nan, problem=str(problem), answered=False)
        return _Judgement(value, text, f"{lacks}: {_short(text)}" if math.isnan(value) else "")

    def _body(self, picture: str, prompt: str) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        if self.mode == "yes_no":
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        # A field set to null is left out: some services know max_completion_tokens instead of max_tokens.
        return {key: value for key, value in {**body, **self.request}.items() if value is not None}

    def _encoded(self, images: Tensor) -> list[str]:
        """PNG in base64 of each image; empty where a pixel is not finite."""
        sound = images.isfinite().flatten(1).all(dim=1).tolist()
        images = images.detach().float().nan_to_num(0.0)
        if self.image_size is not None:
            height, width = images.shape[-2:]
            scale = self.image_size / max(height, width)
            images = resize(images, (max(1, round(height * scale)), max(1, round(width * scale))))
        pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [_png(Image.fromarray(image)) if good else "" for image, good in zip(pixels, sound, strict=True)]

    def _attempts(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The answer to one request, tried at most 1 + retries times. Raises: _NoAnswer with the last reason."""
        import httpx

        assert self._client is not None
        status = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                response = self._client.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                reason, status = one_line(error), None
                continue
            if response.status_code == 200:
                return _mapping(response)
            status = response.status_code
            reason = f"it answered {status}: {_short(response.text)}"
            if status not in _RETRIED and status < 500:
                break
        raise _NoAnswer(reason, status)

    def _connect(self) -> httpx.Client:
        if find_spec("httpx") is None:
            raise RewardError(f"reward '{self.name}' needs httpx: pip install 'flow-align[serve]'")
        import httpx

        headers = {}
        if self.token_env is not None:
            token = os.environ.get(self.token_env)
            if not token:
                raise RewardError(f"reward '{self.name}': the environment variable {self.token_env} is not set")
            headers["Authorization"] = f"Bearer {token}"
        return httpx.Client(
            headers=headers,
            timeout=self.timeout,
            limits=httpx.Limits(max_connections=self.max_in_flight),
            # A proxy does not reach this machine's services.
            trust_env=urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1"),
        )

    def _error(self, what: str) -> RewardError:
        return RewardError(f"reward '{self.name}': the model server at {self.url} {what}")


def _check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    for key, (value, options) in choices.items():
        if value not in options:
            raise RewardError(f"{key} '{value}' must be {' or '.join(options)}{nearest(str(value), options)}")


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."


def _mapping(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise _NoAnswer(f"its answer is not JSON: {_short(response.text)}")
    return answer


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        choice = None
    if not isinstance(choice, Mapping):
        raise _NoAnswer("its answer holds no choice: is this a chat completions endpoint?")
    return choice


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else None
    return text if isinstance(text, str) else ""


def _top(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The most probable tokens of the answer's first position."""
    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        return [(str(entry["token"]), float(entry["logprob"])) for entry in entries]
    except (KeyError, IndexError, TypeError, ValueError):
        raise _NoAnswer("its answer has no top_logprobs: let the server give them, or set mode: score") from None
