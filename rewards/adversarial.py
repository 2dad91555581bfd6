"""A reward that learns with the policy: how much an image looks like reference images (Adv-GRPO, arXiv 2511.20256).

A frozen image network, and a small head that is trained to tell reference images from the policy's own. A fixed reward can
be hacked for good; this one moves on to what still tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.backbone import Backbone, load_backbone
from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, nearest, one_line
from rewards.weights import loading


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half of mean relu(1 - h(real)) + mean relu(1 + h(fake)), of outputs of any shape: 1 where the head says nothing."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def cross_entropy_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-mean log R(real) - mean log(1 - R(fake)) with R = sigmoid(h) (eq. 6): 2 log 2 where the head says nothing."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge_loss, "cross_entropy": cross_entropy_loss}


def drawn_patches(total: int, count: int, seed: int, step: int, group: int) -> Tensor:
    """Positions (min(total, count),) of the patches that are judged: the same for all images of a group in an iteration.

    step and group may be -1.
    """
    draw = np.random.default_rng([seed, step + 1, group + 1])
    return torch.from_numpy(draw.permutation(total)[:count].copy())


class AdversarialReward(Reward):
    """How real an image looks to a discriminator that is trained during the run, against `references`.

    R(x) = global_weight h(class token) + local_weight mean h(patches), h a Linear-GELU-Linear head on the tokens of a
    frozen network, each scaled to mean square 1. Scores of different iterations are not comparable: the head has moved.
    """

    name = "adversarial"
    trainable = True
    uses_prompt = False
    max_batch = 32

    def __init__(
        self,
        references: str | None = None,
        backbone: str = "facebook/dinov2-base",
        hidden: int = 512,
        global_weight: float = 0.7,
        local_weight: float = 0.3,
        patches: int = 64,
        loss: str = "hinge",
        lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.999),
        every: int = 10,
        steps: int = 1,
        seed: int = 0,
    ) -> None:
        """references: folder of images to be like (default: each prompt's own image, in the prompt file);
        backbone: see `rewards.backbone.load_backbone`; hidden: width of the head; patches: judged of each image;
        loss: hinge or cross_entropy; lr, betas: of its Adam;
        every: the policy learns in each every-th iteration and the discriminator in all others, with 1 both in each;
        steps: of the discriminator in an iteration, all on that iteration's images;
        seed: of the head's first weights and of the patches.
        """
        if loss not in _LOSSES:
            raise RewardError(f"loss '{loss}' must be {' or '.join(_LOSSES)}{nearest(str(loss), _LOSSES)}")
        counts = {"hidden": hidden, "patches": patches, "every": every, "steps": steps}
        for key, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RewardError(f"{key} must be a positive integer, got {value!r}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or not lr > 0 or seed < 0:
            raise RewardError("betas must be two numbers in [0, 1), lr positive and seed not negative")
        self.references, self.backbone_name, self.hidden = references, backbone, hidden
        self.global_weight, self.local_weight, self.patches = global_weight, local_weight, patches
        self.loss, self.lr, self.betas = loss, lr, (float(betas[0]), float(betas[1]))
        self.every, self.steps, self.seed = every, steps, seed
        self.backbone: Backbone | None = None
        self.head: nn.Sequential | None = None
        self.optimizer: torch.optim.Adam | None = None

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the network in `dtype` and draw the head in float32. Raises RewardError if weights are missing."""
        with loading(self.name):
            backbone = load_backbone(self.backbone_name, dtype).to(device)
            with torch.no_grad():
                size = backbone.transform["size"]
                width = backbone.tokens(torch.zeros(1, 3, *size))[1].image.shape[1]
            torch.default_generator.manual_seed(self.seed)  # not that of a GPU, which `loading` would leave so
            head = nn.Sequential(nn.Linear(width, self.hidden), nn.GELU(), nn.Linear(self.hidden, 1))
        self.backbone, self._width = backbone, width
        self.head = head.to(device).eval().requires_grad_(False)
        # one kernel a parameter: the arithmetic is then the same wherever the run goes on
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=self.lr, betas=self.betas, foreach=False)

    def score(self, batch: RewardBatch) -> RewardOutput:
        image, patches = self._judged(*self._tokens(batch.images, batch.group_ids.tolist(), batch.step))
        local = patches.mean(dim=1)
        scores = self.global_weight * image + self.local_weight * local
        return RewardOutput(scores, {"global": image, "local": local})

    def policy_turn(self, iteration: int) -> bool:
        return (iteration + 1) % self.every == 0

    def update(self, generated: RewardBatch, reference: Tensor, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Train the head to tell `reference` from `generated`; in the policy's own iterations only measure.

        Returns, as it was before: accuracy in [0, 1], loss, and gap, mean score of references minus that of generated.
        """
        ids = generated.group_ids.tolist()
        fake, real = (self._tokens(images, ids, generated.step) for images in (generated.images, reference))
        whole = torch.stack([part.flatten(1).isfinite().all(dim=1) for part in (*fake, *real)]).all(dim=0)
        fake, real = ((image[whole], patches[whole]) for image, patches in (fake, real))
        trains = self.every == 1 or not self.policy_turn(generated.step)
        first: dict[str, float] = {}
        for _ in range(self.steps if trains else 1):
            measured = self._step(fake, real, total, trains)
            first = first or measured
        return first

    def state_dict(self) -> dict[str, Tensor]:
        """The head's parameters and what its optimiser has gathered."""
        head, optimizer = self._loaded()[1:]
        tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
        for i, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optim.{i}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        return tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        head, optimizer = self._loaded()[1:]
        try:
            head.load_state_dict({k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")})
        except RuntimeError as error:
            raise RewardError(f"reward '{self.name}': the checkpoint's head is another ({one_line(error)})") from error
        full: dict[str, Any] = optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optim."):
                _, index, name = key.split(".", 2)
                entries.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(full | {"state": entries})

    def _loaded(self) -> tuple[Backbone, nn.Sequential, torch.optim.Adam]:
        if self.backbone is None or self.head is None or self.optimizer is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        return self.backbone, self.head, self.optimizer

    @torch.no_grad()
    def _tokens(self, images: Tensor, group_ids: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        """Class token (B, D) and drawn patches (B, P, D) of images (B, 3, H, W), float32, each of mean square 1."""
        backbone = self._loaded()[0]
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(images), self.max_batch):
            last = backbone.tokens(images[start : start + self.max_batch])[1]
            number = last.patches.shape[1]
            ids = group_ids[start : start + self.max_batch]
            drawn = {g: drawn_patches(number, self.patches, self.seed, step, g) for g in set(ids)}
            rows = torch.stack([drawn[g] for g in ids]).to(last.patches.device)
            picked = last.patches.gather(1, rows.unsqueeze(2).expand(-1, -1, last.patches.shape[2]))
            found.append((_scaled(last.image), _scaled(picked)))
        if not found:
            nothing = torch.zeros(0, 1, self._width, device=backbone.device)
            return nothing[:, 0], nothing
        return torch.cat([image for image, _ in found]), torch.cat([patches for _, patches in found])

    def _judged(self, image: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The head's output for class tokens (B,) and patches (B, P)."""
        head = self._loaded()[1]
        return head(image).squeeze(-1), head(patches).squeeze(-1)

    def _step(
        self,
        fake: tuple[Tensor, Tensor],
        real: tuple[Tensor, Tensor],
        total: Callable[[Tensor], Tensor],
        trains: bool,
    ) -> dict[str, float]:
        """One step on tokens of this and the other processes, if it `trains`; what was measured before it."""
        _, head, optimizer = self._loaded()
        count = len(fake[0])
        everyone = float(total(fake[0].new_tensor(float(count))))
        if not everyone:
            return {}
        parameters, loss_of = list(head.parameters()), _LOSSES[self.loss]
        head.requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            (fake_image, fake_patches), (real_image, real_patches) = self._judged(*fake), self._judged(*real)
            loss = fake_image.new_zeros(())
            if count:
                loss = loss_of(real_image, fake_image) + self.local_weight * loss_of(real_patches, fake_patches)
                loss = loss * (count / everyone)
            gradients = [torch.zeros_like(p) for p in parameters]
            if trains and count:
                gradients = list(torch.autograd.grad(loss, parameters))
        head.requires_grad_(False)
        scores = [
            (self.global_weight * image + self.local_weight * patches.mean(dim=1)).detach()
            for image, patches in ((real_image, real_patches), (fake_image, fake_patches))
        ]
        right = ((scores[0] > 0).sum() + (scores[1] <= 0).sum()) / 2
        measured = torch.stack([loss.detach(), right / everyone, (scores[0].sum() - scores[1].sum()) / everyone])
        summed = total(torch.cat([measured, *(g.flatten() for g in gradients)]))
        if trains:
            pieces = summed[len(measured) :].split([p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = piece.view_as(parameter).clone()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return dict(zip(("loss", "accuracy", "gap"), summed[: len(measured)].tolist(), strict=True))


def _scaled(tokens: Tensor) -> Tensor:
    """float32, L2-normalised along the last dimension and multiplied by the root of its length, so that a Linear learns."""
    return F.normalize(tokens.float(), dim=-1) * tokens.shape[-1] ** 0.5
