"""The fields that methods add to a config: one section for a method or for several of them."""

from collections.abc import Iterator

from rmlora_jax.config import LARGE, MOST, Mistake, field, section

UNITS = ("rank", "element", "matrix")


@section
class Rm:
    """The two parts of RM-LoRA."""

    penalty: float = field(0.1, "weight of the orthogonality penalty", least=0, sweep="penalty")
    kind: str = field("norm", "form of the penalty", choices=("norm", "squared", "cosine"))
    keep: float = field(
        0.5, "probability that a rank direction moves (draw exact: how many move)", sweep="keep"
    )
    draw: str = field("bernoulli", "how the mask is drawn", choices=("bernoulli", "exact"))
    unit: str = field("rank", "what moves or stands still as one", choices=UNITS)
    coupling: str = field(
        "paired", "paired: A and B share a draw", choices=("paired", "independent")
    )
    start_step: int = field(1, "first step that is masked", least=0, most=MOST)
    resample_every: int = field(1, "steps between draws", least=1, most=MOST)
    rescale: bool = field(False, "divide what passes the mask by keep")
    placement: str = field(
        "before", "mask before or after the optimizer; lazy: hidden directions do not move at all",
        choices=("before", "after", "lazy"),
    )
    also: bool = field(
        False,
        "mask bitfit, bottleneck or prefix too, but never what lora.train matches; rm.unit may be, "
        "with bitfit: element (an entry of a bias); with prefix: element, or matrix (all keys of a "
        "layer, all its values); with bottleneck: rank (a column of down and its row of up), "
        "element, matrix",
    )

    def check(self) -> Iterator[Mistake]:
        if self.draw == "bernoulli":
            if not 0 < self.keep <= 1:
                yield "keep", "a probability in (0, 1]"
            return
        if not (self.keep >= 1 and self.keep == int(self.keep)):
            yield "keep", "a whole number with draw exact"
        if self.unit != "rank":
            yield "unit", "rank with draw exact"


@section
class AdaLora:
    """The fields of method adalora; its A and B begin as N(0, 0.02^2)."""

    initial_rank: int = field(6, "rank that a layer begins with", least=1, most=LARGE)
    target: float = field(
        0.0, "rank directions that a layer keeps on average; 0: lora.rank", least=0
    )
    warmup: float = field(0.15, "fraction of the steps before the budget falls", least=0)
    final: float = field(0.5, "fraction of the steps, at the end, on the final budget")
    every: int = field(10, "steps between two allocations", least=1)
    orthogonal: float = field(
        0.1, "weight of its penalty on P and Q", least=0, sweep="orthogonal"
    )

    def check(self) -> Iterator[Mistake]:
        if not 0 < self.final < 1 - self.warmup:
            yield "final", "above 0 and, with adalora.warmup, below 1"


@section
class Sora:
    """The fields of method sora."""

    initial_rank: int = field(8, "rank that a layer begins with", least=1, most=LARGE)
    sparsity: float = field(
        0.5, "lambda_2: each step moves a gate towards 0 by this times the rate",
        least=0, sweep="sparsity",
    )
    shrink: float | None = field(
        None,
        "instead of sparsity: what a gate loses over the run, so that one value fits any rate "
        "and length; gates begin as N(0, 1). None: sparsity",
        least=0, sweep="shrink",
    )
    l1: float = field(0.0, "lambda_1: weight of the mean |gate| in the loss", least=0, sweep="l1")
    gate_rate: float = field(1.0, "learning rate of the gates over that of all else", above=0)
    proximal: str = field("paper", "the proximal step", choices=("paper", "authors_exact"))

    def check(self) -> Iterator[Mistake]:
        if self.shrink is not None and self.proximal != "paper":
            yield "shrink", "None where sora.proximal is not paper"


@section
class Bottleneck:
    """The fields of method bottleneck."""

    width: int = field(
        8, "of the adapters: y + up(gelu(down(y))), up begins at 0", least=1, most=LARGE
    )


@section
class Prefix:
    """The fields of method prefix, which DeBERTa cannot have."""

    length: int = field(
        8, "trained keys and values in front of every layer's own", least=1, most=LARGE
    )
