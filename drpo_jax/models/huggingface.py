"""Hugging Face directories, in and out: config.json and safetensors, tensor by tensor.

A parameter of the model is made from tensors of the checkpoint by a `Rule`: which tensors, and how an
index of ours finds its numbers in them. Reading goes through `jax.make_array_from_callback`, so that a
process reads only the slices that its own devices hold, straight into sharded arrays; writing takes one
tensor after the other. Matmul weights are [in, out] here and [out, in] on disk.

Axis letters of parameters: L stacked layers (one axis, or two where layers repeat in groups), E experts.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from drpo_jax.hub import TEXT_FILES, local_directory
from drpo_jax.models.delta_net import channel_order
from drpo_jax.models.settings import ModelConfig
from drpo_jax.models.transformer import Transformer

SKIPPED = ("model.visual.", "visual.", "mtp.", "model.mtp.")  # vision tower, multi-token prediction
KEPT = {"max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}  # of config.json
BESIDE = (  # the weights
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
SHARD_BYTES = 4 * 2**30  # of a file that `save_pretrained` writes


def from_pretrained(path, dtype=jnp.float32, shardings=None):
    """The model of a Hugging Face directory.

    Args:
      path: a directory with config.json and safetensors files (with their index where they are many),
        or a hub id (see `hub.local_directory`).
      dtype: of the parameters.
      shardings: a function from the abstract model (a `Transformer` of shapes) to a pytree of
        shardings, such as `partial(programs.shardings, mesh)`; None puts all on the default device.

    Returns:
      (Transformer, ModelConfig).

    Raises:
      ValueError: an architecture or a setting that is not implemented, or tensors that are missing,
        unexpected or of another shape; all of them are named.
      FileNotFoundError: no config.json or no safetensors.
    """
    path = local_directory(path)
    config = read_config(path)
    checkpoint = Checkpoint(path)
    abstract = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    rules = model_rules(config, abstract, checkpoint.shapes)
    checkpoint.check(rules, config)
    leaves, tree = jax.tree.flatten(abstract)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.leaves(shardings(abstract)) if shardings else [here] * len(leaves)

    def load(leaf, place, rule):
        def part(index):
            return rule.read(checkpoint, index, leaf.shape).astype(dtype)

        return jax.make_array_from_callback(leaf.shape, place, part)

    return jax.tree.unflatten(tree, map(load, leaves, places, rules.values())), config


def save_pretrained(model, config: ModelConfig, path, dtype=None, like=None) -> None:
    """Writes a directory that `transformers` loads: config.json, safetensors and their index.

    Args:
      model: a `Transformer`; its arrays are fetched one layer at a time.
      config: its ModelConfig.
      path: the directory, made if it is not there; files of the same names are replaced.
      dtype: of the tensors on disk; None: as they are.
      like: the directory that the model came from, if any: its tokenizer comes along, and so does
        what its config.json says besides the architecture (longest context, special tokens, …).
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    rules = model_rules(config, model)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model)} if dtype is None else {dtype}
    written, size, shard, index = [], 0, {}, {}

    def flush():
        name = f"model-{len(written) + 1:05d}.safetensors"
        save_file(shard, path / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        written.append(name)
        shard.clear()

    for leaf, rule in zip(jax.tree.leaves(model), rules.values()):
        for name, tensor in rule.write(leaf):
            tensor = np.ascontiguousarray(tensor if dtype is None else tensor.astype(dtype))
            if size + tensor.nbytes > SHARD_BYTES and shard:
                flush()
                size = 0
            shard[name] = tensor
            size += tensor.nbytes
    flush()
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    index_file = {"metadata": {"total_size": total}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")
    fields = write_config(config) | {
        "dtype": str(np.dtype(dtypes.pop())) if len(dtypes) == 1 else "float32"
    }
    if like is not None:
        like = local_directory(like, TEXT_FILES)
        theirs = json.loads((Path(like) / "config.json").read_text())
        theirs = theirs.get("text_config", theirs)
        fields = {k: theirs[k] for k in theirs.keys() & KEPT} | fields
        for name in BESIDE:
            if (Path(like) / name).exists():
                shutil.copy(Path(like) / name, path / name)
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


# ---------------------------------------------------------------------------------- the checkpoint


class Checkpoint:
    """The tensors of a directory by name, read lazily.

    Attributes:
      shapes: {name: shape} of the language model's tensors, under the names of a text-only checkpoint.
    """

    def __init__(self, path: Path):
        index = path / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(p.name for p in path.glob("*.safetensors"))
        if not names:
            raise FileNotFoundError(f"{path}: no *.safetensors in it")
        self.path, self._where, self.shapes = path, {}, {}
        for name in names:
            try:
                file = safe_open(path / name, "np")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path / name} is not a whole safetensors file: {error}"
                ) from error
            for tensor in file.keys():
                if tensor.startswith(SKIPPED) or tensor.endswith("rotary_emb.inv_freq"):
                    continue
                # A multimodal checkpoint keeps its language model one level down.
                plain = tensor.replace("model.language_model.", "model.", 1)
                self._where[plain] = file, tensor
                self.shapes[plain] = tuple(file.get_slice(tensor).get_shape())

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        """A slice of a tensor; `index`: a slice for every axis."""
        file, tensor = self._where[name]
        return file.get_slice(tensor)[index] if index else file.get_tensor(tensor)

    def check(self, rules: dict, config: ModelConfig) -> None:
        """Raises ValueError unless the tensors are those that the rules want."""
        wanted = {name: shape for rule in rules.values() for name, shape in rule.tensors().items()}
        missing = sorted(wanted.keys() - self.shapes.keys())
        tied = {"lm_head.weight"} if config.tie_embeddings else set()  # some files repeat it
        unexpected = sorted(self.shapes.keys() - wanted.keys() - tied)
        misshapen = [
            f"{name} is {self.shapes[name]}, not {shape}"
            for name, shape in sorted(wanted.items())
            if name in self.shapes and self.shapes[name] != shape
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        if found := {kind: names for kind, names in kinds.items() if names}:
            raise ValueError(
                f"{self.path} does not hold the tensors of its config.json\n"
                + "\n".join(
                    f"  {kind} ({len(names)}): {', '.join(names[:8])}"
                    + (", …" if len(names) > 8 else "")
                    for kind, names in found.items()
                )
            )


# ------------------------------------------------------------------------------------------ rules


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter lies on disk.

    Attributes:
      names: array of tensor names, of the shape of the parameter's stacked axes (and of the experts'
        axis, where every expert has its own tensor); of shape () for one tensor.
      shape: of one element of the parameter, as we hold it.
      turned: the last two axes are exchanged on disk.
      half: None, or (which, of): the part of the tensor's last axis but one that is this parameter,
        where several lie in one tensor (gate and up).
      disk_shape: of the tensor, where it has further axes of size 1.
      order: None, or the tensor's channels (its first axis) in our order.
    """

    names: np.ndarray
    shape: tuple[int, ...]
    turned: bool = False
    half: tuple[int, int] | None = None
    disk_shape: tuple[int, ...] | None = None
    order: np.ndarray | None = None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """{name: shape on disk}."""
        shape = self._exchanged(self.shape)
        if self.half:
            shape = (*shape[:-2], shape[-2] * self.half[1], shape[-1])
        return dict.fromkeys(self.names.reshape(-1).tolist(), self.disk_shape or shape)

    def read(self, checkpoint: Checkpoint, index: tuple, whole: tuple) -> np.ndarray:
        """The parameter at `index` (a slice for every axis of `whole`, its shape)."""
        at = [slice(*i.indices(size)[:2]) for i, size in zip(index, whole)]
        names, inner = self.names[tuple(at[: self.names.ndim])], tuple(at[self.names.ndim :])
        parts = [self._element(checkpoint, name, inner) for name in names.reshape(-1)]
        return np.stack(parts).reshape(*names.shape, *parts[0].shape)

    def _element(self, checkpoint, name, inner):
        if self.disk_shape or self.order is not None:  # small tensors
            tensor = checkpoint.read(name).reshape(self._exchanged(self.shape))
            tensor = tensor if self.order is None else tensor[self.order]
            return (np.swapaxes(tensor, -1, -2) if self.turned else tensor)[inner]
        at = list(self._exchanged(inner))
        if self.half:
            start = self.half[0] * self._exchanged(self.shape)[-2]
            at[-2] = slice(at[-2].start + start, at[-2].stop + start)
        tensor = checkpoint.read(name, tuple(at))
        return np.swapaxes(tensor, -1, -2) if self.turned else tensor

    def write(self, leaf) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor), one after the other."""
        for place in np.ndindex(self.names.shape):
            tensor = np.asarray(jax.device_get(leaf[place]))
            tensor = np.swapaxes(tensor, -1, -2) if self.turned else tensor
            if self.order is not None:
                tensor = tensor[np.argsort(self.order)]
            yield str(self.names[place]), tensor.reshape(self.disk_shape or tensor.shape)

    def _exchanged(self, axes):
        return (*axes[:-2], axes[-1], axes[-2]) if self.turned else tuple(axes)


# parameter of a layer -> tensor below model.layers.{i}; matmul weights (two axes) are turned
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
OUTSIDE = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "lm_head": ("lm_head.weight", True),
}
FUSED = {  # experts in one tensor: parameter -> tensor, its part
    "mlp.gate_proj": ("mlp.experts.gate_up_proj", (0, 2)),
    "mlp.up_proj": ("mlp.experts.gate_up_proj", (1, 2)),
    "mlp.down_proj": ("mlp.experts.down_proj", None),
}


def model_rules(config: ModelConfig, model, on_disk=()) -> dict[str, Rule]:
    """{path of a parameter: its Rule}, in the order of the model's leaves.

    Args:
      model: a `Transformer`, of arrays or of shapes.
      on_disk: names of the tensors to read; experts are fused where these are. Empty: as written.
    """
    rules, every = {}, config.full_attention_every
    number = np.arange(config.layers).reshape(-1, every)  # [groups, layers of a group]
    stacks = {"linear": number[:, :-1], "full": number[:, -1]}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        names = [str(getattr(k, "name", getattr(k, "key", k))) for k in path]
        name = ".".join(n for n in names if n != "value")
        if name in OUTSIDE:
            tensor, turned = OUTSIDE[name]
            rules[name] = Rule(np.array(tensor), leaf.shape, turned)
            continue
        inner = name.removeprefix("blocks.")
        stack = inner.partition(".")[0]
        layers, inner = (
            (stacks[stack], inner.partition(".")[2]) if stack in stacks else (number[:, 0], inner)
        )
        rules[name] = _layer_rule(config, inner, layers, leaf.shape[layers.ndim :], on_disk)
    return rules


def _layer_rule(config, inner, layers, shape, on_disk):
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
    return Rule(named(LAYER[inner]), shape, turned=len(shape) == 2)


# ----------------------------------------------------------------------------------------- config

# model_type -> what its layers have
FAMILIES: dict[str, dict] = {
    "llama": dict(qk_norm=False),
    "qwen2": dict(qk_norm=False, attention_bias=True),
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_5_moe_text": dict(attention_gate=True, norm_offset=1.0),
}
FIELDS = {  # of ModelConfig -> of config.json, in every family
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "rms_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
LINEAR = {
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "linear_key_dim": "linear_key_head_dim",
    "linear_value_dim": "linear_value_head_dim",
    "linear_conv_kernel": "linear_conv_kernel_dim",
}
MUST_BE = {  # settings of which one value is implemented
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


def read_config(path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory or hub id, of either dialect of config.json.

    Raises:
      ValueError: a family or a setting that is not implemented.
      FileNotFoundError: no config.json.
    """
    file = local_directory(path, ["config.json"]) / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is not there: {path} must be a Hugging Face directory, such as one that "
            "`hf download OWNER/NAME --local-dir DIRECTORY` makes"
        )
    fields = json.loads(file.read_text())
    tied = fields.get("tie_word_embeddings")
    fields = fields.get("text_config", fields)  # the language part of a multimodal model
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r}; implemented are {', '.join(FAMILIES)}")
    wrong = {k: fields[k] for k, v in MUST_BE.items() if fields.get(k, v) != v}
    if family == "qwen3_moe" and "norm_topk_prob" not in fields:
        wrong["norm_topk_prob"] = False  # its default there
    if fields.get("mlp_only_layers"):
        wrong["mlp_only_layers"] = fields["mlp_only_layers"]
    if family != "qwen2" and fields.get("attention_bias"):
        wrong["attention_bias"] = True
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        wrong["rope_parameters"] = rope
    if wrong:
        settings = ", ".join(f"{k} = {v!r}" for k, v in wrong.items())
        raise ValueError(f"{path}: not implemented for {family}: {settings}")
    known = {ours: fields[theirs] for ours, theirs in FIELDS.items() if theirs in fields}
    if tied is not None:
        known["tie_embeddings"] = tied
    known["head_dim"] = fields.get("head_dim") or known["hidden_size"] // known["heads"]
    known["rope_theta"] = float(rope.get("rope_theta", fields.get("rope_theta", 1e4)))
    experts = fields.get("num_experts", fields.get("num_local_experts", 0))
    if experts:
        known["experts"], known["experts_per_token"] = experts, fields["num_experts_per_tok"]
        known["expert_size"] = fields["moe_intermediate_size"]
    else:
        known["mlp_size"] = fields["intermediate_size"]
    if family == "qwen3_5_moe_text":
        known |= {ours: fields[theirs] for ours, theirs in LINEAR.items()}
        known["shared_expert_size"] = fields["shared_expert_intermediate_size"]
        partial = fields.get("partial_rotary_factor", 0.25)
        known["rotary_fraction"] = rope.get("partial_rotary_factor", partial)
        known["full_attention_every"] = _interval(path, fields)
    return ModelConfig(**known, **FAMILIES[family])


def _interval(path, fields):
    """n where layers n, 2n, … attend."""
    kinds = fields.get("layer_types")
    if not kinds:
        return fields.get("full_attention_interval", 4)
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    pattern = ["linear_attention"] * (every - 1) + ["full_attention"]
    if not every or kinds != pattern * (len(kinds) // every):
        raise ValueError(f"{path}: not implemented: layer_types that do not repeat: {kinds}")
    return every


def write_config(config: ModelConfig) -> dict:
    """The fields of config.json for a ModelConfig, as `transformers` 5 reads them."""
    if config.full_attention_every > 1:
        family, architecture = "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"
    elif config.experts:
        family, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    elif config.qk_norm:
        family, architecture = "qwen3", "Qwen3ForCausalLM"
    elif config.attention_bias:
        family, architecture = "qwen2", "Qwen2ForCausalLM"
    else:
        family, architecture = "llama", "LlamaForCausalLM"
    fields = {"architectures": [architecture], "model_type": family, "hidden_act": "silu"}
    fields |= {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_fraction != 1:
        rope["partial_rotary_factor"] = config.rotary_fraction
    fields |= {
        "head_dim": config.head_dim,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
    }
    if config.experts:
        fields |= dict(
            num_experts=config.experts,
            num_experts_per_tok=config.experts_per_token,
            moe_intermediate_size=config.expert_size,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        )
    else:
        fields["intermediate_size"] = config.mlp_size
    if config.full_attention_every > 1:
        every = config.full_attention_every
        kinds = ["linear_attention"] * (every - 1) + ["full_attention"]
        fields |= {theirs: getattr(config, ours) for ours, theirs in LINEAR.items()}
        fields["shared_expert_intermediate_size"] = config.shared_expert_size
        fields["layer_types"] = kinds * (config.layers // every)
        fields["partial_rotary_factor"] = config.rotary_fraction
    return fields
