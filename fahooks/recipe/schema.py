"""The schema: what a recipe may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A mapping in a recipe: fixed keys, strict types, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OpenSection(Section):
    """A section with the options of a registered thing beside its own keys."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The options, as given."""
        return dict(self.model_extra or {})


Count = Annotated[int, Field(gt=0)]

Fraction = Annotated[float, Field(gt=0, lt=1)]

Positive = Annotated[float, Field(gt=0)]

NonNegative = Annotated[float, Field(ge=0)]

Beta = Annotated[float, Field(ge=0, lt=1)]


def _two(betas: Any) -> Any:
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise PydanticCustomError("two", "must be a list of two numbers, such as [0.9, 0.999]")
    return betas


Betas = Annotated[tuple[Beta, Beta], Field(strict=False), BeforeValidator(_two)]


class Model(OpenSection):
    """The network: a registered name, timm/NAME or torchvision/NAME, with its options."""

    name: str


class Feedback(OpenSection):
    """Which rule sends the error back through which layers, with the rule's options."""

    match: str = "*"
    rule: str


class Hook(OpenSection):
    """What acts on gradients or weights at every step of the optimizer, on which layers, with the hook's options."""

    name: str
    match: str | list[str] | None = None


def _one_step(step: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if len(step) != 1:
        raise PydanticCustomError("one_step", "must be one augmentation with its options, such as {crop: {size: 24}}")
    return step


def default_root() -> str:
    """Where data lie unless a recipe says otherwise."""
    # Its module needs torch, which takes seconds to import and is of no use to who misspells the name of a recipe.
    from fahooks.data import datasets

    return datasets.default_root()


class Data(Section):
    """What to train on.

    Arguments:
        dataset: a registered dataset.
        root: the folder that holds datasets on disk.
        download: fetch missing files.
        dataset_options: the options of that dataset.
        loader: a registered loader, or "auto".
        loader_options: the options of that loader.
        batch_size: images a step, over all processes together; where fewer are trained on, a step takes all of them.
        validation: how many training images choose the best epoch: a number, or a fraction.
        limit: use at most this many training images, validation included.
        augment: registered augmentations with their options, one a mapping, for training images; {crop: {size: 24}} for one.
        corrupt: "refuse" to go on at an image file that can not be decoded, or "skip" it.
    """

    dataset: str
    dataset_options: dict[str, Any] = {}
    root: str = Field(default_factory=default_root)
    download: bool = True
    loader: str = "auto"
    loader_options: dict[str, Any] = {}
    batch_size: Count
    validation: Count | Fraction
    limit: Count | None = None
    augment: list[Annotated[dict[str, dict[str, Any]], AfterValidator(_one_step)]] = []
    corrupt: Literal["refuse", "skip"] = "refuse"

    @field_validator("limit")
    @classmethod
    def _leaves_images_to_train_on(cls, limit: int | None, info: ValidationInfo) -> int | None:
        validation = info.data.get("validation")
        if limit is not None and isinstance(validation, int) and limit <= validation:
            words = "must be more than the {validation} images of data.validation, or none are left"
            raise PydanticCustomError("limit", words, {"validation": validation})
        return limit


class Adam(Section):
    """Adam (Kingma, Ba 2014); weight decay is an L2 term in the gradient."""

    name: Literal["adam"]
    lr: Positive
    weight_decay: NonNegative = 0.0
    betas: Betas = (0.9, 0.999)


class AdamW(Section):
    """AdamW (Loshchilov, Hutter 2019); weight decay shrinks the weights directly."""

    name: Literal["adamw"]
    lr: Positive
    weight_decay: NonNegative = 0.01
    betas: Betas = (0.9, 0.999)


class SGD(Section):
    """Stochastic gradient descent; weight decay is an L2 term in the gradient."""

    name: Literal["sgd"]
    lr: Positive
    weight_decay: NonNegative = 0.0
    momentum: NonNegative = 0.0
    nesterov: bool = False

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise PydanticCustomError("nesterov", "must be false where optim.momentum is 0: set that too, to 0.9 for one")
        return nesterov


class Schedule(Section):
    """What all schedules share.

    Arguments:
        warmup: epochs, or a fraction of one, in which the learning rate rises linearly, at every step, to what the schedule says;
            at most train.epochs.
    """

    warmup: NonNegative = 0.0


class Constant(Schedule):
    """The learning rate stays."""

    name: Literal["constant"] = "constant"


class Step(Schedule):
    """The learning rate is multiplied by `gamma` after every `every` epochs."""

    name: Literal["step"]
    every: Count
    gamma: Positive


class Cosine(Schedule):
    """The learning rate falls to zero along half a cosine, at the end of every epoch."""

    name: Literal["cosine"]


class Train(Section):
    """How to train.

    Arguments:
        epochs: passes over the training images.
        max_steps: end after so many optimizer steps, in the middle of an epoch too, with the learning rates that a whole run has
            there; None for no such end.
        precision: "fp32"; "tf32" for float32 products rounded to 10 bits of mantissa, on a GPU; "bf16" for autocast to bfloat16;
            "fp16" for autocast to float16, with a loss that is scaled up and steps that are skipped where a gradient overflows.
        channels_last: that memory format for model and images.
        compile: run the model through torch.compile.
        accumulate: passes, forward and backward, that a batch is divided into, as evenly as can be; its gradient is that of the
            whole batch, save for what a model draws or measures a pass, as batch norm does.
        clip_norm: the L2 norm that the gradient of all parameters together is scaled down to where it is larger, before hooks
            act on it; None leaves it.
        label_smoothing: share s of each target that is spread over all K classes in the training loss: (1 - s) one-hot + s / K.
        ema: decay of an exponential moving average of the weights, which is then what is evaluated and saved as best; None for
            none. After t steps the decay is min(ema, (1 + t) / (10 + t)).
        distributed: how the processes that torchrun started train together: "ddp" keeps the whole model in each of them,
            "fsdp2" a part of every parameter. The global batch is data.batch_size, whatever their number.
        sync_batchnorm: let batch norm take its statistics over the shares of all processes in a pass, not of each alone; on GPUs.
        device: "auto" takes a GPU where there is one: the first, or that of the process.
        threads: CPU threads for torch, at most 1,024; None leaves them alone.
    """

    epochs: Count
    max_steps: Count | None = None
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    accumulate: Count = 1
    clip_norm: Positive | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Fraction | None = None
    distributed: Literal["ddp", "fsdp2"] = "ddp"
    sync_batchnorm: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None


class Probes(Section):
    """Measurements of the learning signals: every how many steps, None for never."""

    every: Count | None = None


class Checkpoint(Section):
    """When a run is saved, to go on from there, beside its beginning, the end of every epoch, and when it is stopped.

    Arguments:
        every: after every so many optimizer steps; None for never.
        minutes: when so many minutes have passed since it was last saved; None for never.
        keep: how many checkpoints are kept, the newest ones. The best weights are kept in any case.
    """

    every: Count | None = None
    minutes: Positive | None = 15.0
    keep: Count = 1


class Paper(Section):
    """The cell of the paper that the recipe reproduces, with its test error in percent; None where the paper left it blank."""

    table: int
    row: str
    column: str
    error: NonNegative | None


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
    summary: str = ""
    paper: Paper | None = None
    model: Model
    feedback: Annotated[list[Feedback], Field(min_length=1)]
    hooks: list[Hook] = []
    data: Data
    optim: Annotated[Adam | AdamW | SGD, Field(discriminator="name")]
    schedule: Annotated[Constant | Step | Cosine, Field(discriminator="name")] = Constant()
    train: Train
    probes: Probes = Probes()
    checkpoint: Checkpoint = Checkpoint()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def as_yaml(self) -> str:
        """The recipe with the default of every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=130)
