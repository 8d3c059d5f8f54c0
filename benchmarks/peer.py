"""Sampling with `transformers` (torch) and the same weights, as a reference for the sampler's rate."""

import importlib.util
import tempfile

from drpo_jax.models import save_pretrained

INSTALLED = importlib.util.find_spec("torch") is not None


def sampling(model, prompts, new_tokens):
    """Returns functions without arguments that sample by `transformers.generate`, in float32.

    "tokens" samples the tokens alone. "recorded" also computes the logprob of each token and the
    entropy, from the logits that `generate` keeps.

    Args:
      model: A `Transformer` with stacked layers.
      prompts: Lists of token ids, all of one length, one row each.
      new_tokens: Number of tokens of every response.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(model, model.config, directory)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    options = dict(
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        eos_token_id=None,
        top_k=0,
    )

    def tokens():
        with torch.inference_mode():
            theirs.generate(ids, **options)
        return ()

    def recorded():
        with torch.inference_mode():
            out = theirs.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
            logp = torch.stack(out.logits, 1).log_softmax(-1)
            sampled = out.sequences[:, ids.shape[1] :, None]
            logp.gather(-1, sampled), -(logp.exp() * logp).sum(-1)
        return ()

    return {"tokens": tokens, "recorded": recorded}
