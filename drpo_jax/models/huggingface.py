"""Reads and writes Hugging Face directories: config.json and safetensors.

A `Rule` describes how one parameter is stored: in which tensors of the checkpoint, and where in
them its elements are. Reading uses `jax.make_array_from_callback`: a process reads only the slices
that its own devices hold, directly into sharded arrays. Writing fetches one tensor at a time.
Matmul weights are [in, out] in the model and [out, in] on disk.

Axis letters: L stacked layers (two axes where layers repeat in groups), E experts.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from drpo_jax.hub import TEXT_FILES, local_directory
from drpo_jax.models.config_json import read_config, write_config
from drpo_jax.models.delta_net import channel_order
from drpo_jax.models.files import INDEX, WEIGHTS, Checkpoint, copy_tokenizer, read_json, remove
from drpo_jax.models.settings import ModelConfig
from drpo_jax.models.transformer import Transformer
from drpo_jax.storage import path_of

# Fields that `save_pretrained` copies from the config.json of the model and that of the tokenizer.
LENGTH = {"max_position_embeddings"}
SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
SHARD_BYTES = 4 * 2**30  # Maximum size of a file that `save_pretrained` writes.


def from_pretrained(
    path: str | Path,
    dtype: Any = jnp.float32,
    shardings: Callable[[Transformer], Any] | None = None,
) -> tuple[Transformer, ModelConfig]:
    """Loads the model of a Hugging Face directory.

    Args:
      path: a directory with config.json and one or several safetensors files, or a hub id (see
        `hub.local_directory`).
      dtype: dtype of the parameters.
      shardings: maps the abstract model (a `Transformer` of ShapeDtypeStructs) to a pytree of
        shardings, for example `partial(drpo_jax.parallel.shardings, mesh)`. None places all
        parameters on the default device.

    Returns:
      The model and its architecture.

    Raises:
      ValueError: if the architecture or a setting is not supported, or if tensors are missing,
        unexpected, stored twice or of another shape; the message names them.
      FileNotFoundError: if there is no config.json, or if a safetensors file is missing.
    """
    path = local_directory(path)
    config = read_config(path)
    checkpoint = Checkpoint(path)
    abstract = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    rules = model_rules(config, abstract, checkpoint.shapes)
    expected = {name: shape for rule in rules.values() for name, shape in rule.tensors().items()}
    # Some checkpoints with tied embeddings store the head anyway.
    checkpoint.check(expected, optional={"lm_head.weight"} if config.tie_embeddings else ())
    leaves, tree = jax.tree.flatten(abstract)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.leaves(shardings(abstract)) if shardings else [here] * len(leaves)

    def load(leaf, place, rule):
        def part(index):
            return rule.read(checkpoint, index, leaf.shape).astype(dtype)

        return jax.make_array_from_callback(leaf.shape, place, part)

    return jax.tree.unflatten(tree, map(load, leaves, places, rules.values())), config


def save_pretrained(
    model: Transformer,
    config: ModelConfig,
    path: str | Path,
    dtype: Any = None,
    like: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """Writes a directory that `transformers` loads: config.json, safetensors and their index.

    All weights that the directory already contains are removed first, whatever their format, because an
    engine could read them instead of the new ones. config.json is written last, so that the directory
    of an interrupted call cannot be loaded.

    Args:
      model: the model. Its arrays are fetched one layer at a time.
      config: its architecture.
      path: the output directory. It is created if necessary.
      dtype: dtype of the tensors on disk; None keeps that of the parameters.
      like: the directory that the model came from, if any. Its tokenizer is copied, and so are
        fields of its config.json that do not belong to the architecture (longest context, special
        tokens).
      tokenizer: a directory whose tokenizer and special tokens are used instead of those of `like`. If
        both are None, tokenizer files in the output directory are left unchanged.
    """
    path = path_of(path)
    tokenizer = like if tokenizer is None else tokenizer
    copied = _copied_fields(like, LENGTH) | _copied_fields(tokenizer, SPECIAL_TOKENS)
    path.mkdir(parents=True, exist_ok=True)
    remove(path, (*WEIGHTS, "config.json"))
    _write_weights(model, model_rules(config, model), path, dtype)
    if tokenizer is not None:
        copy_tokenizer(local_directory(tokenizer, TEXT_FILES), path)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model)} if dtype is None else {dtype}
    kept = {"dtype": str(np.dtype(dtypes.pop())) if len(dtypes) == 1 else "float32"}
    fields = copied | write_config(config) | kept
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _copied_fields(directory: str | Path | None, names: Collection[str]) -> dict[str, Any]:
    """Returns those of the named fields that the directory's config.json has."""
    if directory is None:
        return {}
    file = local_directory(directory, TEXT_FILES) / "config.json"
    fields = read_json(file) if file.exists() else {}
    fields = fields.get("text_config", fields)
    return {name: fields[name] for name in names if name in fields}


def _write_weights(model: Transformer, rules: dict[str, "Rule"], path: Path, dtype: Any) -> None:
    """Writes safetensors files of at most SHARD_BYTES (or with a single tensor), and their index."""
    size = total = files = 0
    shard: dict[str, np.ndarray] = {}
    index: dict[str, str] = {}

    def flush():
        nonlocal files
        files += 1
        name = f"model-{files:05d}.safetensors"
        save_file(shard, path / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for leaf, rule in zip(jax.tree.leaves(model), rules.values()):
        for name, tensor in rule.write(leaf):
            tensor = np.ascontiguousarray(tensor if dtype is None else tensor.astype(dtype))
            if size + tensor.nbytes > SHARD_BYTES and shard:
                flush()
                size = 0
            shard[name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
    flush()
    index_file = {"metadata": {"total_size": total}, "weight_map": index}
    (path / INDEX).write_text(json.dumps(index_file, indent=2) + "\n")


# ------------------------------------------------------------------------------------------ rules


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter is stored on disk.

    Attributes:
      names: array of tensor names. Its shape is that of the parameter's stacked axes, followed by
        the experts' axis if every expert has its own tensor; () for a single tensor.
      shape: shape of the part of the parameter that one tensor holds.
      transposed: whether the last two axes are exchanged on disk.
      half: (index, count) if one tensor holds several parameters (gate and up), concatenated along
        its second to last axis; None otherwise.
      disk_shape: shape of the tensor if it has additional axes of size 1; None otherwise.
      order: indices that bring the tensor's channels (its first axis) into the model's order, or
        None.
    """

    names: np.ndarray
    shape: tuple[int, ...]
    transposed: bool = False
    half: tuple[int, int] | None = None
    disk_shape: tuple[int, ...] | None = None
    order: np.ndarray | None = None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes on disk by tensor name."""
        shape = self._exchanged(self.shape)
        if self.half:
            shape = (*shape[:-2], shape[-2] * self.half[1], shape[-1])
        return dict.fromkeys(self.names.reshape(-1).tolist(), self.disk_shape or shape)

    def read(
        self, checkpoint: Checkpoint, index: tuple[slice, ...], whole: tuple[int, ...]
    ) -> np.ndarray:
        """Returns a part of the parameter.

        Args:
          checkpoint: the tensors.
          index: a slice for every axis.
          whole: shape of the parameter.
        """
        at = [slice(*i.indices(size)[:2]) for i, size in zip(index, whole)]
        names, inner = self.names[tuple(at[: self.names.ndim])], tuple(at[self.names.ndim :])
        parts = [self._element(checkpoint, name, inner) for name in names.reshape(-1)]
        return np.stack(parts).reshape(*names.shape, *parts[0].shape)

    def _element(self, checkpoint, name, inner):
        if self.disk_shape or self.order is not None:  # These tensors are small and read whole.
            tensor = checkpoint.read(name).reshape(self._exchanged(self.shape))
            tensor = tensor if self.order is None else tensor[self.order]
            return (np.swapaxes(tensor, -1, -2) if self.transposed else tensor)[inner]
        at = list(self._exchanged(inner))
        if self.half:
            start = self.half[0] * self._exchanged(self.shape)[-2]
            at[-2] = slice(at[-2].start + start, at[-2].stop + start)
        tensor = checkpoint.read(name, tuple(at))
        return np.swapaxes(tensor, -1, -2) if self.transposed else tensor

    def write(self, leaf: jax.Array) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) for each tensor of the parameter."""
        for place in np.ndindex(self.names.shape):
            tensor = np.asarray(jax.device_get(leaf[place]))
            tensor = np.swapaxes(tensor, -1, -2) if self.transposed else tensor
            if self.order is not None:
                tensor = tensor[np.argsort(self.order)]
            yield str(self.names[place]), tensor.reshape(self.disk_shape or tensor.shape)

    def _exchanged(self, axes):
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed else tuple(axes)


# Parameters of a layer and their tensors in model.layers.{i}. Matmul weights (two axes) are
# transposed.
LAYER = {
    "input_norm": "input_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    **{f"attention.{n}": f"self_attn.{n}.weight" for n in "q_proj k_proj v_proj o_proj".split()},
    **{f"attention.{n}_norm": f"self_attn.{n}_norm.weight" for n in "qk"},
    **{f"attention.{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
    "attention.qkv_proj": "linear_attn.in_proj_qkv.weight",
    "attention.z_proj": "linear_attn.in_proj_z.weight",
    "attention.beta_gate": "linear_attn.in_proj_b.weight",
    "attention.decay_gate": "linear_attn.in_proj_a.weight",
    "attention.conv": "linear_attn.conv1d.weight",
    "attention.A_log": "linear_attn.A_log",
    "attention.dt_bias": "linear_attn.dt_bias",
    "attention.norm": "linear_attn.norm.weight",
    "attention.out_proj": "linear_attn.out_proj.weight",
    **{f"mlp.{n}_proj": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    "mlp.router": "mlp.gate.weight",
    **{
        f"mlp.shared.{n}_proj": f"mlp.shared_expert.{n}_proj.weight" for n in ("gate", "up", "down")
    },
    "mlp.shared_gate": "mlp.shared_expert_gate.weight",
}
# Parameters outside the layers: tensor, and whether it is transposed.
OUTSIDE = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "lm_head": ("lm_head.weight", True),
}
# Parameters whose experts share one tensor in some checkpoints: tensor, and `Rule.half`.
FUSED = {
    "mlp.gate_proj": ("mlp.experts.gate_up_proj", (0, 2)),
    "mlp.up_proj": ("mlp.experts.gate_up_proj", (1, 2)),
    "mlp.down_proj": ("mlp.experts.down_proj", None),
}


def model_rules(
    config: ModelConfig, model: Transformer, on_disk: Collection[str] = ()
) -> dict[str, Rule]:
    """Returns the Rule of each parameter by its path, in the order of the model's leaves.

    Args:
      config: the architecture.
      model: a `Transformer` of arrays or ShapeDtypeStructs.
      on_disk: names of the tensors to read, which show whether experts are fused. Empty: the rules
        for writing, with one tensor per expert.
    """
    rules, every = {}, config.full_attention_every
    # Numbers of the layers, [groups, layers of a group].
    number = np.arange(config.layers).reshape(-1, every)
    stacks = {"linear": number[:, :-1], "full": number[:, -1]}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        names = [str(getattr(k, "name", getattr(k, "key", k))) for k in path]
        name = ".".join(n for n in names if n != "value")
        if name in OUTSIDE:
            tensor, transposed = OUTSIDE[name]
            rules[name] = Rule(np.array(tensor), leaf.shape, transposed)
            continue
        inner = name.removeprefix("blocks.")
        stack = inner.partition(".")[0]
        layers, inner = (
            (stacks[stack], inner.partition(".")[2]) if stack in stacks else (number[:, 0], inner)
        )
        rules[name] = _layer_rule(config, inner, layers, leaf.shape[layers.ndim :], on_disk)
    return rules


def _layer_rule(config, inner, layers, shape, on_disk) -> Rule:
    """Returns the Rule of a layer's parameter.

    Args:
      inner: path of the parameter in the layer.
      layers: int array of layer numbers, of the shape of the parameter's stacked axes.
      shape: shape of the parameter without its stacked axes.
    """

    def tensor(layer, name):
        return f"model.layers.{layer}.{name}"

    def named(name):
        return np.vectorize(lambda i: tensor(i, name), otypes=[object])(layers)

    if config.experts and inner in FUSED:
        fused, half = FUSED[inner]
        if tensor(layers.flat[0], fused) in on_disk:
            return Rule(named(fused), shape, True, half)
        part = inner.removeprefix("mlp.")
        experts = [named(f"mlp.experts.{e}.{part}.weight") for e in range(config.experts)]
        return Rule(np.stack(experts, axis=-1), shape[1:], True)
    if inner in ("attention.qkv_proj", "attention.conv"):
        order = channel_order(config)
        disk = (shape[1], 1, shape[0]) if inner.endswith("conv") else None
        return Rule(named(LAYER[inner]), shape, True, None, disk, order)
    return Rule(named(LAYER[inner]), shape, transposed=len(shape) == 2)
