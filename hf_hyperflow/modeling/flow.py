"""The flow: from a support set to the weights of an adapter, by networks that a checkpoint holds."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import Hidden, SplitBackbone
from .calibration import Calibration
from .configuration import HyperFlowConfig
from .drift import DriftNetwork
from .finite import NotFiniteError
from .gate import find_blocks
from .injection import Injection
from .lda import RegularisedLDA
from .parameter_space import ParameterSpace
from .peft_configs import build_peft_config
from .prototypes import Head, unit_means
from .rejection import RejectionCalibration
from .solvers import Trajectory, integrate, list_stage_times
from .stopping import StoppingPoint, choose_stopping_point
from .task_encoder import TaskEncoder, TaskTokens, pool_tokens
from .trunks import IncompatibleBackboneError

T = TypeVar("T", bound="Flow")


class WeightPath(NamedTuple):
    """The weights along the flow of one support set.

    Attributes:
        times: from 0 to the end of the flow.
        thetas: the adapter's weights at each of these times, `(n_tokens, token_dim)`.
        stopping_point: where the flow was stopped.
        nfe: how often the velocity was computed.
        hidden: what the first blocks compute of the support images; None where that was not needed.
    """

    times: list[float]
    thetas: list[torch.Tensor]
    stopping_point: StoppingPoint
    nfe: int
    hidden: Hidden | None

    @property
    def theta(self) -> torch.Tensor:
        """The weights where the flow was stopped."""
        return self.thetas[self.times.index(self.stopping_point.time)]


class Flow(PreTrainedModel):
    """The networks of an adapter and the flow that they make of a support set, as plain functions of tensors.

    `HyperFlowAdapter` is a flow that reads images, and adapts backbones that other threads may use at the same time.

    Attributes:
        space: the parameters that the flow moves, see `ParameterSpace`.
        processor: the backbone's image processor, saved with the adapter; None if the adapter was made without one.
        training_record: how the adapter was trained and what that cost. It is saved as `training.json` and rendered
            in the model card; None if it is not known.
        encoder: the separate support encoder; None where the frozen first blocks of the backbone encode the support.
        task_encoder: turns the features of a support set into task tokens.
        drift: the drift network h_phi.
        start_z: `(n_tokens, token_dim)`, the learned point where the flow starts, in its units; None where it starts at
            the backbone's own weights.
        token_scale: `(n_tokens, 1)`, the change of theta, row by row, that one unit of the flow stands for.
        logit_scale: logarithm of the scale of the logits in training, and of every task if there is no `calibration`.
        head: turns support features into prototypes: a regularised LDA, or plain class means.
    """

    config_class = HyperFlowConfig
    base_model_prefix = "hyperflow"
    main_input_name = "pixel_values"
    config: HyperFlowConfig
    token_scale: torch.Tensor

    def __init__(self, config: HyperFlowConfig):
        super().__init__(config)
        n_blocks, width = config.backbone["num_blocks"], config.backbone["hidden_size"]
        if not 1 <= config.last_blocks <= n_blocks:
            raise ValueError(f"last_blocks={config.last_blocks}, but there are {n_blocks} blocks.")
        if config.image_size is not None and (len(config.image_size) != 2 or min(config.image_size) < 1):
            raise ValueError(f"image_size={config.image_size}, expected a height and a width.")
        self.space = ParameterSpace(
            build_peft_config(config.peft),
            width,
            config.tensor_names,
            config.tensor_shapes,
            frozen=tuple(config.frozen_tensors),
            seed=config.adapter_seed,
        )
        self.processor: BaseImageProcessor | None = None
        self.training_record: dict[str, Any] | None = None
        self.encoder: PreTrainedModel | None = None
        encoder_width = config.backbone.get("prefix_width", width)
        if config.encoder is not None:
            encoder_config = AutoConfig.for_model(**config.encoder)
            self.encoder = AutoModel.from_config(encoder_config).eval().requires_grad_(False)
            encoder_width = _get_encoder_width(encoder_config)
        self.task_encoder = TaskEncoder(2 * encoder_width, config.drift_width)
        self.drift = DriftNetwork(
            self.space.n_tokens, self.space.token_dim, config.drift_width, config.drift_depth, config.drift_heads
        )
        self.start_z: nn.Parameter | None = None
        if config.learned_start:
            self.start_z = nn.Parameter(torch.zeros(self.space.n_tokens, self.space.token_dim))
        self.register_buffer("token_scale", torch.full((self.space.n_tokens, 1), 0.02))
        # Calibration usually ends near these scales, so training starts there.
        scale = 20.0 if config.lda else 10.0
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        feature_width = width
        if config.intermediate_weight:
            feature_width += config.backbone.get("prefix_width", width)
        self.head: Head = RegularisedLDA(feature_width) if config.lda else unit_means
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: each part initialises itself (the drift network with an output of zero)."""

    def train(self: T, mode: bool = True) -> T:
        """Switch to training mode; the support encoder is frozen and stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def split(self, backbone: PreTrainedModel) -> SplitBackbone:
        """The backbone in two halves: the frozen first blocks and the adapted last ones.

        Raises:
            IncompatibleBackboneError: the backbone cannot be adapted, or it has another width or depth than the adapter
                was made for.
        """
        expected = self.config.backbone
        blocks = find_blocks(backbone)
        wrong = []
        for key, value in (("hidden_size", blocks.width), ("num_blocks", len(blocks))):
            if value != expected[key]:
                wrong.append(f"{key} is {value}, expected {expected[key]}")
        if wrong:
            raise IncompatibleBackboneError(
                f"this {type(backbone).__name__} is not the backbone of the adapter: {'; '.join(wrong)}. "
                f"Use {expected['name_or_path'] or 'the ' + expected['model_type'] + ' it was trained for'}."
            )
        start = len(blocks) - self.config.last_blocks
        return SplitBackbone(backbone, start, self.config.pooling, blocks, self.config.intermediate_weight)

    @property
    def calibration(self) -> Calibration:
        """How the logits of a task are scaled.

        Raises:
            NotFiniteError: the scale in the weights is zero or not finite.
        """
        if self.config.calibration is not None:
            return Calibration(**self.config.calibration)
        exponent = self.logit_scale.item()
        scale = self.logit_scale.exp().item()
        if not 0 < scale < math.inf:
            raise NotFiniteError(f"logit_scale of the adapter is {exponent:g}, which makes a scale of {scale:g}.")
        return Calibration(constant=exponent)

    @property
    def rejection(self) -> RejectionCalibration | None:
        """How tasks tell images of none of their classes; None if nothing was fitted."""
        if self.config.rejection is None:
            return None
        return RejectionCalibration(**self.config.rejection)

    def follow(
        self,
        split: SplitBackbone,
        injection: Injection,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        hidden: Hidden | None = None,
        *,
        n_steps: int | None = None,
        solver: str | None = None,
        end_time: float = 1.0,
        early_stopping: bool = False,
    ) -> WeightPath:
        """The flow of one support set, as weights: `HyperFlowAdapter.adapt` without reading images and without locks.

        Args:
            injection: the adapter in the backbone.
            pixel_values: `(n, 3, height, width)`.
            labels: `(n,)` in 0..n_way-1.
            hidden: the hidden states of the images behind the first blocks, if they are known already.
            n_steps, solver, end_time: see `flow`.
            early_stopping: see `HyperFlowAdapter.adapt`.
        """
        tokens, hidden = self.encode(split, pixel_values, labels, hidden)
        trajectory = self.flow(tokens, n_steps=n_steps, solver=solver, end_time=end_time)
        states = [state[0] for state in trajectory.states]
        return self.to_path(split, injection, trajectory, states, pixel_values, labels, hidden, early_stopping)

    def to_path(
        self,
        split: SplitBackbone,
        injection: Injection,
        trajectory: Trajectory,
        states: list[torch.Tensor],
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        hidden: Hidden | None,
        early_stopping: bool,
    ) -> WeightPath:
        """The weights along a trajectory, for one of its support sets, and where the flow is stopped.

        Args:
            states: the states of that support set, `(n_tokens, token_dim)` at each time.
            injection, pixel_values, labels, hidden, early_stopping: see `follow`.
        """
        times, thetas = trajectory.times, [self.theta(state, injection.start) for state in states]
        stopping_point = StoppingPoint(times[-1])
        # Weights that are not finite are an error of the caller's, which no stopping point mends.
        if early_stopping and torch.stack(thetas).isfinite().all():
            hidden = hidden or split.forward_prefix(pixel_values)
            stopping_point = choose_stopping_point(split, injection, hidden, labels, times, thetas, self.head)
        return WeightPath(times, thetas, stopping_point, trajectory.nfe, hidden)

    def encode(
        self, split: SplitBackbone, pixel_values: torch.Tensor, labels: torch.Tensor, hidden: Hidden | None = None
    ) -> tuple[TaskTokens, Hidden | None]:
        """Task tokens of one support set (batch 1), and the hidden states of its images, see `encode_images`."""
        features, hidden = self.encode_images(split, pixel_values, hidden)
        return self.task_encoder(features.to(self.logit_scale.dtype), labels.to(self.device)), hidden

    def encode_images(
        self, split: SplitBackbone, pixel_values: torch.Tensor, hidden: Hidden | None = None
    ) -> tuple[torch.Tensor, Hidden | None]:
        """Features `(n, feature_dim)` of images for the task encoder, and the hidden states behind the first blocks.

        Images larger than `config.image_size` are encoded at that size or at `config.reduced_size`, because the flow
        has seen no larger ones. For these, and with a separate encoder, the features do not come from the hidden states
        of the images as they are, and the second result is `hidden` as it was given.

        Args:
            pixel_values: `(n, 3, height, width)`.
            hidden: the hidden states behind the first blocks, if they are known already.
        """
        reduced = self._reduce(pixel_values)
        if self.encoder is not None:
            states = self.encoder(reduced.to(self.device, self.encoder.dtype)).last_hidden_state
            return pool_tokens(states), hidden
        if reduced is not pixel_values:
            states = split.get_prefix_states(split.forward_prefix(reduced))
            return pool_tokens(states).to(self.device), hidden
        if hidden is None:
            hidden = split.forward_prefix(pixel_values)
        return pool_tokens(split.get_prefix_states(hidden)).to(self.device), hidden

    def _reduce(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Bring images larger than those of training down; leave others as they are."""
        largest = self.config.image_size
        if largest is None or math.prod(pixel_values.shape[-2:]) <= math.prod(largest):
            return pixel_values
        size = tuple(self.config.reduced_size or largest)
        small = F.interpolate(pixel_values.float(), size=size, mode="bicubic", antialias=True)
        return small.to(pixel_values.dtype)

    def flow(
        self, tokens: TaskTokens, *, n_steps: int | None = None, solver: str | None = None, end_time: float = 1.0
    ) -> Trajectory:
        """Integrate the velocity from t = 0 to `end_time`, for a batch of tasks.

        The states are `(batch, n_tokens, token_dim)`; `theta` turns them into weights. The first is z = 0 or, where the
        start is learned, `start_z`. Differentiable. Without steps (`n_steps=0`) there is no flow, z is 0, and no solver
        is needed.

        Raises:
            ValueError, ImportError: see `integrate`.
        """
        shape = (len(tokens.task), self.space.n_tokens, self.space.token_dim)
        start = torch.zeros(shape, dtype=tokens.task.dtype, device=self.device)
        if isinstance(n_steps, Integral) and not isinstance(n_steps, bool) and n_steps == 0:
            return Trajectory([0.0], [start], nfe=0)
        if self.start_z is not None:
            start = start + self.start_z
        n_steps = self.config.n_steps if n_steps is None else n_steps
        method = solver or self.config.solver
        conditions = self.drift.prepare(tokens, list_stage_times(n_steps, method, end_time))
        mask = self.space.mask.to(self.device)

        def compute_velocity(z: torch.Tensor, t: float) -> torch.Tensor:
            return self.drift.move(self._leave_start(z), t, conditions) * mask

        return integrate(compute_velocity, start, n_steps=n_steps, method=method, end_time=end_time)

    def velocity(self, z: torch.Tensor, t: torch.Tensor | float, tokens: TaskTokens) -> torch.Tensor:
        """d z / d t at z `(batch, n_tokens, token_dim)` and time t, a number or `(batch,)`; zero on padding."""
        return self.drift(self._leave_start(z), t, tokens) * self.space.mask.to(z.device)

    def _leave_start(self, z: torch.Tensor) -> torch.Tensor:
        """How far the flow has gone, which is what the drift network is given."""
        return z if self.start_z is None else z - self.start_z

    def theta(self, z: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The adapter's weights at a point z of the flow: start + token_scale * z.

        Args:
            z: `(..., n_tokens, token_dim)`, as is the result.
            start: `(n_tokens, token_dim)`, the weights before the flow, see `Injection.start`.
        """
        return start + (self.token_scale * z).to(start)


def _get_encoder_width(config: PreTrainedConfig) -> int:
    """The width of a vision model's last hidden states. Convolutional models list one width per stage."""
    sizes = vars(config).get("hidden_sizes")
    return sizes[-1] if sizes else config.hidden_size
