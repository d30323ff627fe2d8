"""Text towers: features that padding cannot change, exact rebuilding, precision, gradients, the optional libraries."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

from lightning_modules.errors import ModelError
from lightning_modules.text.hugging_face import HuggingFaceText
from lightning_modules.text.open_clip import OpenClipText
from lightning_modules.text.tower import build, optional_package
from lightning_modules.text.transformer import SmallText

SIZES = {"vocabulary": 300, "context": 16, "width": 24, "layers": 2, "heads": 3}
CAPTIONS = ["a cat", "two dogs, on a very green lawn!", "x-ray of the chest", "2019", "猫"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dog", "##s", "green", ",", "!"]


def small(**changes):
    torch.manual_seed(0)
    return SmallText(**{**SIZES, **changes})


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT's configuration, random weights and vocabulary."""
    transformers = pytest.importorskip("transformers", reason='needs the extra: pip install "farshot[text]"')
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The text tower of a small model that open_clip learns about from a file."""
    library = pytest.importorskip("open_clip", reason='needs the extra: pip install "farshot[text]"')
    path = tmp_path_factory.mktemp("clip") / "small-clip.json"
    image = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    path.write_text(json.dumps({"embed_dim": 48, "vision_cfg": image, "text_cfg": text}))
    library.add_model_config(path)
    handlers = list(logging.getLogger().handlers)
    tower = OpenClipText("small-clip", context=12)
    assert logging.getLogger().handlers == handlers
    return tower


def assert_padding_is_invisible(tower, tolerance=1e-6):
    tower.eval()
    together = tower(tower.tokenize(CAPTIONS))
    assert together.shape == (len(CAPTIONS), tower.width)
    for place, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(tower(tower.tokenize([caption]))[0], together[place], atol=tolerance, rtol=0)
    assert torch.pdist(together.detach()).min() > 1e-3  # captions differ in what they give


def assert_rebuilt(tower):
    """The tower of a checkpoint that holds plain types and tensors gives the same numbers."""
    again = build(json.loads(json.dumps(tower.describe())))
    again.load_state_dict(tower.state_dict())
    tokens = tower.tokenize(CAPTIONS)
    assert torch.equal(again.tokenize(CAPTIONS), tokens)
    assert torch.equal(again.eval()(tokens), tower.eval()(tokens))


def assert_all_parameters_learn(tower):
    tower.train()
    tower.zero_grad()
    tokens = tower.tokenize(CAPTIONS)
    (tower(tokens) * torch.randn(len(CAPTIONS), tower.width)).sum().backward()
    still = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    assert not still
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())
    tower.zero_grad()


def test_small_features():
    tower = small()
    assert_padding_is_invisible(tower)
    assert_rebuilt(tower)
    assert_all_parameters_learn(tower)
    assert tower.describe() == {"class": "lightning_modules.text.transformer.SmallText", **SIZES}


def test_small_against_attention_written_out():
    """The library's encoder, with and without gradient, equals pre-norm causal blocks written out in float64."""
    tower = small().double()
    tokens = tower.tokenize(CAPTIONS[1:2])
    states = (tower.token_embedding(tokens) + tower.position_embedding)[0]
    steps, size = len(states), SIZES["width"] // SIZES["heads"]
    for block in tower.blocks.layers:
        query, key, value = (
            block.self_attn.in_proj_weight @ block.norm1(states).T + block.self_attn.in_proj_bias[:, None]
        ).T.split(SIZES["width"], dim=1)
        heads = []
        for head in range(SIZES["heads"]):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / size**0.5
            scores[torch.ones(steps, steps).triu(1).bool()] = -torch.inf
            heads.append(scores.softmax(dim=1) @ value[:, part])
        states = states + block.self_attn.out_proj(torch.cat(heads, dim=1))
        states = states + block.linear2(nn.functional.gelu(block.linear1(block.norm2(states))))
    expected = tower.norm(states)[int(tokens.argmin()) - 1]  # the first padding follows the end token
    torch.testing.assert_close(tower.train()(tokens)[0], expected, atol=1e-12, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(tower.eval()(tokens)[0], expected, atol=1e-12, rtol=0)


def test_small_starts_as_clip_does():
    tower = small(vocabulary=5000, width=96, heads=4, layers=3)
    block = tower.blocks.layers[1]
    for tensor, deviation in (
        (tower.token_embedding.weight, 0.02),
        (tower.position_embedding, 0.01),
        (block.self_attn.in_proj_weight, 96**-0.5),
        (block.self_attn.out_proj.weight, 96**-0.5 / 6**0.5),
        (block.linear1.weight, 192**-0.5),
        (block.linear2.weight, 96**-0.5 / 6**0.5),
    ):
        assert tensor.std().item() == pytest.approx(deviation, rel=0.06)
    assert not any(
        parameter.any() for name, parameter in tower.named_parameters() if name.endswith("bias") and "norm" not in name
    )
    first, second = tower.blocks.layers[0], tower.blocks.layers[1]
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_small_in_half_precision(dtype, tolerance):
    tower = small()
    tokens = tower.tokenize(CAPTIONS)
    expected = tower(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(tower(tokens).float(), expected, atol=0.1, rtol=0)
    features = tower.to(dtype)(tokens)
    assert features.dtype == dtype
    torch.testing.assert_close(features.float(), expected, atol=tolerance, rtol=0)


def test_small_learns_order():
    """Words are told apart by position: a bag of words could not learn which of two captions is which."""
    tower = small()
    tokens = tower.tokenize(["dog bites man", "man bites dog"])
    parameters = list(tower.parameters())
    for _ in range(40):
        loss = nn.functional.cross_entropy(tower(tokens)[:, :2], torch.arange(2))
        with torch.no_grad():
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.3 * slope
    assert loss < 0.05


def test_small_counts_what_it_cuts():
    tower = small(context=6)
    tokens, cut = tower.tokenize_counted(["a b c d", "a b c d e", "a b c d f g h"])
    assert tokens.shape == (3, 6)
    assert tokens.dtype == torch.int64
    assert cut == 2
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[1], tokens[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, ["5 heads", "width 24"]),
        ({"vocabulary": 3}, ["vocabulary=3"]),
        ({"context": 2}, ["context=2"]),
        ({"layers": 0}, ["layers is 0"]),
        ({"width": "24"}, ["width is '24'"]),
    ],
)
def test_small_refuses_sizes(changes, words):
    with pytest.raises(ModelError) as error:
        small(**changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "torch.nn.Linear",
        "lightning_modules.classification.Classification",
        "lightning_modules.text.tower.TextTower",
        "lightning_modules.text.tower.nn",
        "lightning_modules.text.transformer.ModelError",
        "lightning_modules.text.transformer.SmallTex",
        "lightning_modules.text.absent.SmallText",
        "lightning_modules.text..transformer.SmallText",
        "lightning_modules.text.transformer.SmallText\n",
        None,
        7,
    ],
)
def test_checkpoints_name_towers_alone(path):
    with pytest.raises(ModelError, match="no text tower"):
        build({**SIZES, "class": path})


def test_unknown_arguments_are_named():
    with pytest.raises(ModelError) as error:
        build({"class": "lightning_modules.text.transformer.SmallText", "depth": 3})
    assert "depth" in str(error.value)
    assert "layers" in str(error.value)


def test_absent_package_is_named():
    with pytest.raises(ModelError, match=r'pip install "farshot\[text\]"'):
        optional_package("a_package_that_nobody_has")


def test_open_clip_features(clip):
    assert clip.width == 64  # the states', not the shared space's 48
    assert_padding_is_invisible(clip, tolerance=1e-5)
    assert_all_parameters_learn(clip)
    assert_rebuilt(clip)
    assert copy.deepcopy(clip).describe() == clip.describe()


def test_open_clip_default_is_the_tower_of_clip():
    pytest.importorskip("open_clip")
    tower = OpenClipText()
    assert (tower.width, tower.context) == (512, 77)
    blocks = 12 * (12 * 512**2 + 13 * 512)  # attention and perceptron with biases, two norms
    assert sum(parameter.numel() for parameter in tower.parameters()) == (49408 + 77) * 512 + blocks + 2 * 512


def test_open_clip_tokens(clip):
    import open_clip

    captions = [*CAPTIONS, "one two three four five six seven eight nine ten", "a " * 11, "a! b!"]
    tokens, cut = clip.tokenize_counted(captions)
    assert torch.equal(tokens, open_clip.SimpleTokenizer()(captions, context_length=12))
    assert cut == 1
    assert tokens[-3:, 0].tolist() == [49406] * 3
    assert tokens[-3, -1] == 49407


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "RN5O"}, ["RN5O", "RN50"]),
        ({"model": "roberta-ViT-B-32"}, ["roberta-ViT-B-32", "HuggingFaceText"]),
        ({"model": "coca_ViT-B-32"}, ["coca_ViT-B-32", "such as RN50"]),
        ({"model": "ViT-B-16-SigLIP"}, ["ViT-B-16-SigLIP", "such as RN50"]),
        ({"model": "hf-hub:somebody/model"}, ["hf-hub:somebody/model", "list_models"]),
        ({"pretrained": "absent"}, ["absent", "openai"]),
        ({"context": 2}, ["context is 2"]),
    ],
)
def test_open_clip_refuses(clip, arguments, words):
    with pytest.raises(ModelError) as error:
        OpenClipText(**arguments)
    assert all(word in str(error.value) for word in words)


def test_hugging_face_features(bert):
    tower = HuggingFaceText(str(bert), context=10)
    assert tower.width == 16
    assert_all_parameters_learn(tower)
    assert_rebuilt(tower)
    captions = ["a cat", "two dogs, green!"]
    tower.eval()
    both = tower(tower.tokenize(captions))
    torch.testing.assert_close(tower(tower.tokenize(captions[:1]))[0], both[0], atol=1e-6, rtol=0)
    assert copy.deepcopy(tower).tokenize(captions).tolist() == tower.tokenize(captions).tolist()


def test_hugging_face_weights_only_when_asked(bert):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.BertModel.from_pretrained(bert).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(bert)
    batch = tokenizer(["a cat", "two dogs , green !"], padding=True, return_tensors="pt")
    expected = oracle(**batch).pooler_output
    tower = HuggingFaceText(str(bert), context=10, pretrained=True).eval()
    tokens = tower.tokenize(["a cat", "two dogs , green !"])
    torch.testing.assert_close(tower(tokens), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(HuggingFaceText(str(bert), context=10).eval()(tokens), expected, atol=1e-3)
    assert "pretrained" not in tower.describe()


def test_hugging_face_tokens(bert):
    tower = HuggingFaceText(str(bert), context=6)
    tokens, cut = tower.tokenize_counted(["a cat", "Two dogs, green!", "a cat a cat"])
    assert tokens.tolist() == [[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 11, 3], [2, 5, 6, 5, 6, 3]]
    assert cut == 1


def test_hugging_face_mean_of_states(bert, tmp_path):
    """A model without a pooler gives the mean of its states over real tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=len(WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=20
    )
    config.save_pretrained(tmp_path)
    transformers.BertTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    tower = HuggingFaceText(str(tmp_path), context=10).eval()
    tokens = tower.tokenize(["a cat", "two dogs, green!"])
    states = tower.tower(input_ids=tokens[:1, :4]).last_hidden_state
    torch.testing.assert_close(tower(tokens)[0], states[0].mean(dim=0), atol=1e-6, rtol=0)


def test_hugging_face_refuses(bert, tmp_path):
    with pytest.raises(ModelError, match="context is 21"):
        HuggingFaceText(str(bert), context=21)
    with pytest.raises(ModelError, match="context is 2 "):
        HuggingFaceText(str(bert), context=2)
    with pytest.raises(ModelError, match="hf download"):
        HuggingFaceText(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 5}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((bert / name).read_text())
    with pytest.raises(ModelError, match="does not fit the model"):
        HuggingFaceText(str(tmp_path), context=10)
