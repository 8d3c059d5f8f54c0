"""What docs/security.md says of files from elsewhere: no process runs their code."""

import json
import os
import pickle

import numpy as np
import pytest

from drpo_jax.data import TextTokenizer
from drpo_jax.learner.record import load_rollout
from drpo_jax.models import from_pretrained
from tests.pretrained import TEMPLATE, write_tokenizer


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def proof(tmp_path):
    """A path that exists once code of a file has run."""
    return tmp_path / "proof"


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__base__",
        "cycler.__init__.__globals__.os.mkdir('x')",
        "self.__init__.__globals__",
    ],
)
def test_a_chat_template_reaches_no_python_objects(tmp_path, expression):
    write_tokenizer(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text(TEMPLATE + "{{ " + expression + " }}")
    with pytest.raises(ValueError, match="the chat template failed: .*(unsafe|undefined)"):
        TextTokenizer(tmp_path, chat=True)


def test_a_template_cannot_change_what_it_is_given(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text(TEMPLATE + "{{ messages.append(1) }}")
    with pytest.raises(ValueError, match="the chat template failed: .*unsafe"):
        TextTokenizer(tmp_path, chat=True)


def test_a_pickled_model_is_not_read(tmp_path, proof):
    config = dict(model_type="llama", vocab_size=8, hidden_size=8, num_hidden_layers=1)
    config |= dict(num_attention_heads=1, num_key_value_heads=1, intermediate_size=8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        from_pretrained(tmp_path)
    assert not proof.exists()


def test_the_code_of_a_model_directory_is_not_imported(tmp_path, proof):
    write_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Evil: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        path = tmp_path / name
        fields = json.loads(path.read_text()) if path.exists() else {}
        fields["auto_map"] = {
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
            "AutoConfig": "evil.Evil",
        }
        path.write_text(json.dumps(fields))
    TextTokenizer(tmp_path, chat=True)
    assert not proof.exists()


def test_a_pickled_object_in_a_rollout_is_not_read(tmp_path, proof):
    path = tmp_path / "step_000001.npz"
    np.savez(path, tokens=np.array([Payload(proof)], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_rollout(path)
    assert not proof.exists()
