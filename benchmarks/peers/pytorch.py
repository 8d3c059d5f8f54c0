"""Worker: sampling with `transformers`, updates in plain PyTorch.

Sampling is `generate` with a key-value cache; the logprobs come from the logits that it keeps. An update
is the usual loop over micro-batches: SDPA attention without a mask (all sequences have equal length),
logits of the response alone, a clipped policy-gradient loss, clipping by the global norm, fused AdamW.
Updates run under torch.compile if the warm-up finds that faster. For sampling, a static cache is a third
slower than the default one on CPU.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import protocol, work

PACKAGES = "torch", "transformers"


class Work:
    """The work on one model.

    Args:
      task: shape, directory and settings, see `contenders.Contender`. Settings: micro_batch; compile
        (torch.compile of the model in updates); experts (the `experts_implementation` of a mixture).
    """

    def __init__(self, task: dict[str, Any]):
        settings, self._directory = task["settings"], Path(task["directory"])
        self._shape, self._micro_batch = work.Shape(**task["shape"]), settings["micro_batch"]
        self._model = load(self._directory, settings)
        self._forward = torch.compile(self._model) if settings.get("compile") else self._model
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(self._model),
            lr=work.LEARNING_RATE,
            betas=(work.B1, work.B2),
            eps=work.EPS,
            fused=True,
        )
        batch = work.Batch.load(self._directory)
        self._tokens, self._old_logp, self._advantage = map(
            torch.from_numpy, (batch.tokens, batch.old_logp, batch.advantage)
        )
        prompts = work.read_prompts(self._directory)[: self._shape.prompts]
        ids = torch.tensor([work.token_ids(prompt) for prompt in prompts])
        self._prompts = ids.repeat_interleave(self._shape.samples, dim=0)
        self._options = dict(
            attention_mask=torch.ones_like(self._prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=self._shape.response,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )

    def score(self) -> dict[str, Any]:
        """Returns the logprobs of the given tokens before any update."""
        with torch.inference_mode():
            parts = self._tokens.split(self._micro_batch)
            logp = torch.cat([self._logp(self._model, tokens) for tokens in parts])
        return {"logp": logp.tolist()}

    def sample(self) -> dict[str, Any]:
        """Samples with logprobs."""
        self._model.eval()
        with torch.inference_mode():
            out = self._model.generate(
                self._prompts, **self._options, return_dict_in_generate=True, output_logits=True
            )
            sampled = out.sequences[:, self._shape.prompt :, None]
            logp = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, sampled)
        return {"tokens": sampled.numel(), "mean_logp": float(logp.mean())}

    def sample_tokens(self) -> dict[str, Any]:
        """Samples tokens alone."""
        self._model.eval()
        with torch.inference_mode():
            out = self._model.generate(self._prompts, **self._options)
        return {"tokens": out[:, self._shape.prompt :].numel()}

    def update(self) -> dict[str, Any]:
        """Makes one optimizer update on the given tokens."""
        self._model.train()
        total = 0.0
        for rows in torch.arange(len(self._tokens)).split(self._micro_batch):
            logp = self._logp(self._forward, self._tokens[rows])
            ratio, advantage = (logp - self._old_logp[rows]).exp(), self._advantage[rows, None]
            clipped = ratio.clamp(1 - work.EPSILON, 1 + work.EPSILON)
            objective = torch.minimum(ratio * advantage, clipped * advantage)
            loss = -objective.sum() / self._old_logp.numel()
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), work.CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._forward is not self._model:
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()  # They would count as memory of this process.
        return {"loss": total, "grad_norm": norm.item()}

    def _logp(self, forward, tokens):
        """Returns the logprobs of the response, [n, R]."""
        response = self._shape.response
        logits = forward(tokens, use_cache=False, logits_to_keep=response + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, tokens[:, -response:, None])[..., 0]


def load(directory: Path, settings: dict[str, Any]) -> torch.nn.Module:
    """Loads the model of a shape in float32."""
    experts = {"experts_implementation": settings["experts"]} if "experts" in settings else {}
    return AutoModelForCausalLM.from_pretrained(
        directory / "model", dtype=torch.float32, attn_implementation="sdpa", **experts
    )


def _parameter_groups(model):
    """Weight decay is for matrices only, as in the other contenders."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": work.WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]


def main(task: dict[str, Any]) -> None:
    """Serves the work of a task."""
    torch.set_num_threads(task["threads"])
    server, one = protocol.Server(PACKAGES), Work(task)
    names = "score", "sample", "sample_tokens", "update"
    server.serve({name: getattr(one, name) for name in names})


if __name__ == "__main__":
    protocol.run(main)
