"""The exported archives in other libraries: transformers' generation and training, PEFT, lm-eval.

Run with ``pip install -r requirements-ecosystem.txt`` and ``pytest -m integration tests/test_ecosystem.py``; tests of
packages that are not installed are skipped.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache, Trainer, TrainingArguments, pipeline

from mvlm_core.export.archive import opened, write_archive
from tests.helpers import MODELS, sample_books

pytestmark = pytest.mark.integration
PROMPTS = ["In the beginning", "And it came to pass in the days", "The LORD"]
LORA_TARGETS = {"mvlm_gpt2": ["c_attn"], "simone_enhanced": ["q_proj", "v_proj", "memory_head"]}


@pytest.fixture(scope="session")
def unpacked(trained, tmp_path_factory):
    """Model name → the folder its archive was extracted to."""
    place = tmp_path_factory.mktemp("elsewhere")
    with ExitStack() as stack:
        for name in MODELS:
            write_archive(trained / name, place / f"{name}.tar.gz")
        yield {name: stack.enter_context(opened(place / f"{name}.tar.gz")) for name in MODELS}


@pytest.fixture(params=MODELS)
def loaded(request, unpacked):
    """Name, folder, model and tokenizer, loaded with plain transformers."""
    folder = unpacked[request.param]
    options = {"trust_remote_code": True, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return request.param, folder, model, tokenizer


def rows(tokenizer, count=16, length=24):
    """Real text as training examples."""
    ids = tokenizer(sample_books()["genesis"], add_special_tokens=False, verbose=False).input_ids
    cut = [torch.tensor(ids[n * length : (n + 1) * length]) for n in range(count)]
    return [{"input_ids": row, "labels": row} for row in cut]


def fine_tune(model, data, folder, **changes):
    """A few steps of transformers.Trainer; returns the loss before and after."""
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}

    def loss():
        model.eval()
        with torch.inference_mode():
            return float(model(**batch).loss)

    before = loss()
    values = {"max_steps": 8, "learning_rate": 5e-3} | changes
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, seed=0, **values,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return before, loss()


def test_text_generation_pipeline(loaded):
    _, folder, model, tokenizer = loaded
    write = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    text = write(PROMPTS[0], max_new_tokens=6, do_sample=False)[0]["generated_text"]
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    own = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert text == tokenizer.decode(own[0], skip_special_tokens=True) and text.startswith(PROMPTS[0])


def test_greedy_generation_matches_argmax_of_uncached_forward_passes(loaded):
    _, _, model, tokenizer = loaded
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    barred = model.generation_config.eos_token_id  # by min_new_tokens
    for _ in range(8):
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, barred] = -torch.inf
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(made, ids)


def test_sampling_is_reproducible_with_the_same_seed(loaded):
    _, _, model, tokenizer = loaded
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=True, top_k=50)[0]))
    assert made[0] == made[1] != made[2]


def test_beam_search_finds_text_at_least_as_likely_as_greedy(loaded):
    _, _, model, tokenizer = loaded
    ids = tokenizer(PROMPTS[1], return_tensors="pt")
    length = ids.input_ids.shape[1]

    def likelihood(made):
        with torch.inference_mode():
            scores = model(made[:, :-1]).logits.log_softmax(-1).gather(2, made[:, 1:, None])
        return float(scores[:, length - 1 :].sum())

    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    greedy, beam = (model.generate(**ids, num_beams=beams, **options) for beams in (1, 4))
    assert beam.shape == greedy.shape and likelihood(beam) >= likelihood(greedy) - 1e-4


def test_left_padded_batch_generates_the_same_tokens_as_single_prompts(loaded):
    _, _, model, tokenizer = loaded
    tokenizer.padding_side = "left"
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = model.generate(**tokenizer(PROMPTS, return_tensors="pt", padding=True), **options)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0]
        assert torch.equal(row[-6:], alone[-6:]), prompt


def test_static_cache_generates_the_same_tokens(loaded):
    _, _, model, tokenizer = loaded
    ids = tokenizer(PROMPTS[1], return_tensors="pt")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(**ids, past_key_values=cache, **options), model.generate(**ids, **options))


@pytest.mark.parametrize("checkpointing", (False, True))
def test_fine_tuning_with_trainer(loaded, tmp_path, checkpointing):
    _, _, model, tokenizer = loaded
    before, after = fine_tune(model, rows(tokenizer), tmp_path, gradient_checkpointing=checkpointing)
    assert after < before - 0.1


def test_fine_tuning_with_added_tokens_survives_save_and_reload(loaded, tmp_path):
    _, _, model, tokenizer = loaded
    tokenizer.add_tokens(["<verse>", "<chapter>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    first = torch.tensor([tokenizer.convert_tokens_to_ids("<verse>")])
    data = [{key: torch.cat((first, value)) for key, value in row.items()} for row in rows(tokenizer)]
    before, after = fine_tune(model, data, tmp_path)
    assert after < before - 0.1
    model.save_pretrained(tmp_path / "more")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "more", trust_remote_code=True)
    ids = data[0]["input_ids"][None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_lora(loaded, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install -r requirements-ecosystem.txt")
    name, folder, model, tokenizer = loaded
    config = peft.LoraConfig(
        r=4, target_modules=LORA_TARGETS[name], task_type="CAUSAL_LM", fan_in_fan_out="gpt2" in name
    )
    adapted = peft.get_peft_model(model, config)
    before, after = fine_tune(adapted, rows(tokenizer), tmp_path, max_steps=80, learning_rate=0.05)
    assert after < before - 0.02
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    plain = fresh(ids).logits
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits)
    assert not torch.allclose(plain, again(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_lm_eval_measures_the_same_bits_per_byte(name, unpacked, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-ecosystem.txt")
    from mvlm_core.evaluation.bits_per_byte import context_of, encode, load_export, score_documents

    model, tokenizer = load_export(unpacked[name])
    context = context_of(model)  # longer texts would be split into different windows
    verses = sample_books()["ecclesiastes"].split("\n")
    texts = [verse for verse in verses if 8 < len(encode(tokenizer, verse)) < context][:12]
    assert texts
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "verses.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "verses.yaml").write_text(
        f"task: verses\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'verses.jsonl'}\n"
        "test_split: train\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "verses", "--include_path", str(tmp_path)]
    command += ["--model_args", f"pretrained={unpacked[name]},trust_remote_code=True", "--device", "cpu"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (answer,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(answer.read_text())["results"]["verses"]["bits_per_byte,none"]
    ours = score_documents(
        model, lambda text: encode(tokenizer, text), enumerate(texts), start_id=tokenizer.bos_token_id, context=context
    )
    assert theirs == pytest.approx(ours.bits_per_byte, rel=1e-4)
