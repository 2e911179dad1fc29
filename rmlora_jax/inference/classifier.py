"""A trained model, ready for use: files, images or texts in, labels and probabilities out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

import rmlora_jax as rm
from rmlora_jax.errors import UserError, progress
from rmlora_jax.files import read_object
from rmlora_jax.hub.info import FILE, Info, check_fits
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.source import CONFIG
from rmlora_jax.hub.weights import some
from rmlora_jax.inference.inputs import READERS
from rmlora_jax.models.attention import blaming
from rmlora_jax.models.family import IMAGES


def check_problem(base: Pretrained) -> None:
    """Raises a UserError where config.json asks for more than one label or number at once."""
    kind = str(read_object(base.folder / CONFIG).get("problem_type"))
    several = {"multi_label_classification": "labels"}
    several |= {"regression": "numbers"} if base.num_labels > 1 else {}
    if kind in several:
        raise UserError(f"{base.folder / CONFIG}: problem_type is {kind!r}, several "
                        f"{several[kind]} at once, which is not supported; train a classifier from "
                        "it")


def info_of(base: Pretrained) -> Info:
    """What a whole model's own files say about its use.

    Raises:
      UserError: it gives several labels, or several numbers, at once.
    """
    check_problem(base)
    if base.family.inputs is IMAGES:
        resize = "square" if base.image_resize is None else "processor"
        return Info("image_classification", base.labels, base.image_size, resize=resize)
    longest = min(512, base.config.longest or 512)
    if base.num_labels == 1:
        return Info("text_regression", max_length=longest)
    return Info("text_classification", labels=base.labels, max_length=longest)


class Prediction(NamedTuple):
    """The answer of a model to one input.

    Attributes:
      input: path of a file, the text or pair of texts, or "image 3" for an image without a name.
      label: name of the class; None for regression.
      probability: of that class; None for regression.
      value: of a regression, else None.
    """

    input: str | tuple[str, ...]
    label: str | None
    probability: float | None
    value: float | None = None


class NotFinite(UserError):
    """Inputs whose logits are not finite; no label is made of these."""


class Classifier:
    """A trained model on one device, from `load` or from parts in memory.

    Its inputs are

    * for images a list of paths of files and of folders (searched to any depth, in sorted order),
      of pillow's images and of uint8 arrays (H, W, C), mixed at will, or one uint8 array
      (n, H, W, C), read as `inputs.read_image` says;
    * for texts a list of strings, or of pairs of strings where ``info.columns`` has two names.

    Args:
      base: the pretrained model, with as many outputs as ``params`` and images of their size.
      params: of ``base``'s model, with factors where ``lora`` is given.
      lora: the description of the factors; None for a model without factors.
      info: what the model is for.

    Attributes:
      model: the Linen module, adapted; ``params``, on the device, are its parameters.
      forward: ``forward(params, *arguments of the model)`` is float32 (b, outputs); jitted.

    Raises:
      UserError: the parts do not belong together, or a model of texts has no tokenizer.
    """

    def __init__(self, base: Pretrained, params: dict, lora: rm.LoRA | None, info: Info):
        check_fits(base, info)
        self.base, self.info = base, info
        self.read = READERS[base.family.inputs](base, info)
        model = base.family.model(base.config, base.num_labels, dtype=jnp.dtype(info.dtype))
        self.model = model = model if lora is None else rm.adapt(model, lora)
        self.params = jax.device_put(params)

        @jax.jit
        def forward(params, *inputs):
            logits = model.apply({"params": params}, *inputs, train=False)
            return jnp.asarray(logits, jnp.float32)

        self.forward = forward

    def __call__(
        self,
        inputs: Any,
        *,
        top: int = 1,
        batch_size: int = 64,
        failed: Callable[[UserError], None] | None = None,
    ) -> list[Prediction]:
        """The ``top`` most probable classes of each input, or its value, in the inputs' order.

        Args:
          inputs: see above.
          top: predictions of each input, the most probable first; at most the number of classes.
          batch_size: inputs in one call of the program; a few inputs are padded to a power of two.
          failed: called with the error of images that cannot be read, and of inputs whose logits
            are not finite, which are then left out; None raises it.

        Raises:
          UserError: an input is no image or text, or cannot be read, or its logits are not finite.
        """
        names, logits = self._outputs(inputs, batch_size, failed)
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            lost = [name for name, good in zip(names, finite, strict=True) if not good]
            error = NotFinite(f"the outputs of {len(lost)} of {len(names)} inputs are not finite, "
                              f"so they have no prediction: {some(list(map(str, lost)))}; the "
                              f"model's weights are damaged, or {self.info.dtype} is too narrow")
            if failed is None:
                raise error
            failed(error)
            names = [name for name, good in zip(names, finite, strict=True) if good]
            logits = logits[finite]
        if self.info.is_regression:
            pairs = zip(names, logits[:, 0].tolist(), strict=True)
            return [Prediction(name, None, None, value) for name, value in pairs]
        probabilities = softmax(logits.astype(np.float64), axis=1)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return [
            Prediction(name, self.info.label(k), float(row[k]))
            for name, row, classes in zip(names, probabilities, best.tolist(), strict=True)
            for k in classes
        ]

    def logits(self, inputs: Any, *, batch_size: int = 64) -> np.ndarray:
        """The model's outputs, float32 (n, classes), in the inputs' order; arguments as above.

        They are given as they are, finite or not.
        """
        return self._outputs(inputs, batch_size, None)[1]

    def _outputs(self, inputs, batch_size, failed) -> tuple[list, np.ndarray]:
        """The names of the inputs that could be read, and their logits."""
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        names, batches = self.read(inputs, batch_size, failed)
        logits = np.empty((len(names), self.base.num_labels), np.float32)
        done = np.zeros(len(names), bool)
        few = len(names) <= 4 * batch_size  # done before a person could read a bar
        with progress(len(names), "predicting", " inputs", disable=few) as bar:
            for ids, arguments in batches:
                with blaming(self.info.dtype, f"the model's {FILE}, dtype"):
                    logits[ids] = np.asarray(self.forward(self.params, *arguments))[: len(ids)]
                done[ids] = True
                bar.update(len(ids))
        return [name for name, good in zip(names, done, strict=True) if good], logits[done]
