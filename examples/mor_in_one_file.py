"""Mixture of rewards in one file: three sites that share nothing align one vision-language model.

Lu et al. 2026, arXiv 2605.03426. The paper in five lines:

    1  site k has preference pairs and trains its own reward model           L = − E log σ(R_k(x, y⁺) − R_k(x, y⁻))
    2  its scores leave it standardised by its own training statistics       R̄_k = (R_k − μ_k) / σ_k
    3  a router learns the domain of an answer, by federated averaging with the sites' numbers as labels
    4  the server samples answers, asks the one site that the router names, and takes its score as the reward
    5  GRPO; the result is an ordinary Hugging Face checkpoint

Read it from top to bottom. The whole method is here. From accord it imports only the things that any VLM script needs:
the questions, a checkpoint loader, and a collator that encodes an image once however many answers it has. The package
adds messages, validation, absent sites, byte counts and resuming.

    python examples/mor_in_one_file.py            about five minutes of one core
    python examples/mor_in_one_file.py --quick    under a minute; shows that it runs, and learns next to nothing
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
from collections import Counter, defaultdict

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from accord.data.easy_vqa import EASY_VQA_ANSWERS, load_easy_vqa, type_of
from accord.models.inputs import build_batch, model_inputs
from accord.models.load import load_model
from accord.types import vqa_prompt

arguments = argparse.ArgumentParser(description="the whole method in one file")
arguments.add_argument("--quick", action="store_true", help="a few steps of everything")
arguments.add_argument("--seed", type=int, default=0)
options = arguments.parse_args()
QUICK = options.quick

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
set_seed(options.seed)
generator = random.Random(options.seed)
began = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The sites and their questions.
#
# easy-VQA has 64-pixel pictures of one coloured shape, three kinds of question, and thirteen answers. Each kind is the
# domain of one site, each site runs another architecture, and no picture is at two sites. Shapes are the hardest to
# see, so their site gets half of the pictures.


SITES = {  # name: question type, architecture, sixths of the private images
    "colour": ("colour", "accord/llava-siglip-qwen2", (0,)),
    "shape": ("shape", "accord/idefics3", (1, 2, 3)),
    "yes-no": ("yes/no", "accord/llava-clip-llama", (4, 5)),
}
POLICY = "accord/llava-clip-llama"
MAX_TOKENS = 3  # every answer is one token and an end token; the third leaves room for a wrong answer that is longer
REJECTED = 11  # of about twenty wrong answers; with seven the shape site ended at 68 % in one run and 94 % in another

everything = load_easy_vqa()
number = {image: i for i, image in enumerate(dict.fromkeys(q.image for q in everything))}


def of_split(split, count=0):
    """Questions of a split; with `count`, as many of each type, drawn once and for all."""
    found = [q for q in everything if q.split == split]
    if not count:
        return found
    kept = []
    for kind in sorted({q.question_type for q in found}):
        kept += random.Random(0).sample([q for q in found if q.question_type == kind], count)
    return kept


private = {
    name: [q for q in of_split("private") if q.question_type == kind and number[q.image] % 6 in sixths]
    for name, (kind, _, sixths) in SITES.items()
}
dev, test = of_split("dev", 60), of_split("test", 30 if QUICK else 300)
public = of_split("public")  # the server's prompts; nothing reads their reference answers
say("questions  " + "  ".join(f"{name} {len(questions)}" for name, questions in private.items()))

# ----------------------------------------------------------------------------------------------------------------------
# A VLM does two things here: it gives hidden states of (image, question, answer), and it answers.


def picture(question, turned=False):
    with Image.open(question.image) as opened:
        image = opened.convert("RGB")
    if turned:  # turns and mirrors change no answer, and the sites have few pictures
        image = image.rotate(90 * generator.randrange(4))
        image = ImageOps.mirror(image) if generator.random() < 0.5 else image
    return image


def hidden_states(vlm, batch):
    """Last hidden states `[N, T, D]`; the vision tower runs once per image, not once per answer."""
    inner = vlm.base_model
    return inner(**model_inputs(inner, batch), use_cache=False).last_hidden_state


@torch.no_grad()
def answers(vlm, processor, questions, samples=0):
    """The greedy answer to each question, or `samples` drawn ones; a list of texts per question."""
    vlm.eval()
    how = dict(do_sample=True, top_k=0, num_return_sequences=samples) if samples else dict(do_sample=False)
    said = []
    for start in range(0, len(questions), 128):
        chunk = questions[start : start + 128]
        texts = [processor.apply_chat_template(vqa_prompt(q.text), add_generation_prompt=True) for q in chunk]
        inputs = processor(images=[[picture(q)] for q in chunk], text=texts, return_tensors="pt", padding=True)
        ids = vlm.generate(**inputs, max_new_tokens=MAX_TOKENS, **how)[:, inputs["input_ids"].shape[1] :]
        decoded = processor.batch_decode(ids, skip_special_tokens=True)
        said += [[t.strip() for t in decoded[i : i + (samples or 1)]] for i in range(0, len(decoded), samples or 1)]
    return said


def accuracy(vlm, processor):
    right = defaultdict(list)
    for q, (text,) in zip(test, answers(vlm, processor, test), strict=True):
        right[q.question_type].append(text.lower() == q.answer)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def shown(by_type):
    macro = sum(by_type.values()) / len(by_type)
    return "  ".join(f"{kind} {value:.1%}" for kind, value in by_type.items()) + f"  macro {macro:.1%}"


base, base_processor = load_model(POLICY)
before = accuracy(base, base_processor)
say(f"base       {shown(before)}")

# ----------------------------------------------------------------------------------------------------------------------
# Preference pairs, at the sites.
#
# These pairs are constructed; no person judged them. The reference answer is chosen, and wrong answers are rejected.
# The choice of wrong answers decides everything: a reward model gives random scores to answers of a kind that it has
# never seen, and GRPO finds the high ones within some dozens of steps. If the rejected answers are of the right type
# only ("red" over "blue"), GRPO finds "red red", or a shape for a colour. With those added, but no answers run
# together, it finds "circletriangle": the reward rises from 0.9 to 1.3, and shapes named rightly fall from 36 to
# 15 % (one seed). So the rejected answers are: the whole vocabulary, two answers joined in every way, the empty answer,
# and the answers that the base policy really gives, because the optimiser starts there.


def candidates(question, said, rejected):
    """The reference answer first, then `rejected` different wrong ones."""
    right = question.answer
    same = [a for a in EASY_VQA_ANSWERS if type_of(a) == question.question_type]
    a, b, c = generator.choices(same, k=3)
    joined = [f"{right} {a}", f"{right}{b}", f"{b}{right}", f"{a}{b}", f"{b} {c}"]
    wrong = {*EASY_VQA_ANSWERS, *said, *joined, ""} - {right}
    return [right, *generator.sample(sorted(wrong), rejected)]


# ----------------------------------------------------------------------------------------------------------------------
# A reward model: a VLM with a scalar head on the last token. Each site trains its own, and the model never leaves the
# site.


class RewardModel(nn.Module):
    def __init__(self, checkpoint):
        super().__init__()
        self.vlm, self.processor = load_model(checkpoint)
        self.head = nn.Linear(self.vlm.config.get_text_config().hidden_size, 1)
        self.mean, self.deviation = 0.0, 1.0

    def forward(self, prompts, images, completions):
        """Raw scores `[N]` of all completions, prompt after prompt."""
        batch = build_batch(self.processor, prompts, images, completions)
        hidden = hidden_states(self.vlm, batch)
        return self.head(hidden[torch.arange(len(hidden)), batch.last_token]).squeeze(-1)

    @torch.no_grad()
    def score(self, prompts, images, completions):
        """The scores that leave the site: standardised, then clipped to [0, 2].

        Two reward models share no scale, and GRPO compares their scores within one group; the paper loses 16 points
        without μ and σ. The clip is ours. In a group of bad answers the differences are the reward model's noise. GRPO
        divides by their deviation, so the noise would become the gradient. The floor at 0, the score of the average
        training answer, turns such a group into a tie.
        """
        self.eval()
        return ((self(prompts, images, completions) - self.mean) / self.deviation).clamp(0.0, 2.0)


def steps_of(model, count, learning_rate):
    """Yield `count` times; after each turn of the loop body the caller's loss is in `.grad` and is applied here."""
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=count + 1)
    model.train()
    for step in range(count):
        yield step
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def train_reward_model(site, questions, said):
    model = RewardModel(SITES[site][1])

    # First the backbone learns its own domain from plain answers. If the backbone cannot tell triangles from circles, a
    # head on it learns the noise of 16 images a batch. With Bradley–Terry alone, the yes/no site stays at chance.
    for _ in steps_of(model, 3 if QUICK else 150, 1e-3):
        drawn = generator.sample(questions, 64)
        batch = build_batch(
            model.processor,
            [vqa_prompt(q.text) for q in drawn],
            [picture(q, turned=True) for q in drawn],
            [[q.answer] for q in drawn],
        )
        logits = model.vlm.lm_head(hidden_states(model.vlm, batch))  # [N, T, vocabulary]
        cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()

    # Then Bradley–Terry: every question is a group of one chosen and eleven rejected answers, scored together.
    for _ in steps_of(model, 3 if QUICK else 250, 1e-3):
        drawn = generator.sample(range(len(questions)), 16)
        groups = [candidates(questions[i], said[i], REJECTED) for i in drawn]
        scores = model(
            [vqa_prompt(questions[i].text) for i in drawn],
            [picture(questions[i], turned=True) for i in drawn],
            groups,
        ).view(16, 1 + REJECTED)
        chosen, rejected = scores[:, :1], scores[:, 1:]
        # The second term pins the free offset of the scores near zero (Eisenstein et al. 2023); TRL has it too.
        loss = -logsigmoid(chosen - rejected).mean() + 0.01 * (chosen + rejected).square().mean()
        loss.backward()

    # μ and σ pool the chosen and the rejected answers of the site's own pairs.
    drawn = generator.sample(range(len(questions)), 16 if QUICK else 256)
    model.eval()
    with torch.no_grad():
        raw = model(
            [vqa_prompt(questions[i].text) for i in drawn],
            [picture(questions[i]) for i in drawn],
            [candidates(questions[i], said[i], REJECTED) for i in drawn],
        )
    model.mean, model.deviation = raw.mean().item(), raw.std().item()
    return model.requires_grad_(False)


@torch.no_grad()
def ranking(model, questions):
    """How often the right answer scores above all twelve others.

    This says more than pair accuracy: GRPO exploited reward models that ordered 80 % of their pairs rightly.
    """
    groups = [[q.answer, *(a for a in EASY_VQA_ANSWERS if a != q.answer)] for q in questions]
    raw = model([vqa_prompt(q.text) for q in questions], [picture(q) for q in questions], groups)
    scores = raw.view(len(questions), -1)
    return (scores[:, :1] > scores[:, 1:]).all(dim=1).float().mean().item()


judges: dict[str, RewardModel] = {}
samples: dict[str, list[list[str]]] = {}  # what the base policy says to each site's questions
for site, questions in private.items():
    if QUICK:
        questions = private[site] = questions[:200]
    samples[site] = answers(base, base_processor, questions, samples=4)
    judges[site] = train_reward_model(site, questions, samples[site])
    held_out = [q for q in dev if q.question_type == SITES[site][0]]
    say(f"site       {site}: right answer on top of all thirteen {ranking(judges[site], held_out):.1%}")

# ----------------------------------------------------------------------------------------------------------------------
# The router, by federated averaging.
#
# The router sees (image, question, answer) through the frozen base policy and names the site of that domain. Its labels
# are the sites' own numbers, so each site holds a single class. Only the router's weights are shared. The router learns
# domains, and not which judge is right: it still asks a site that is wrong about its own domain.
#
# Differs: the paper puts four Transformer layers under the linear head, as does `accord.routing.router`. Here the head
# alone is enough. The encoder is frozen, so a site encodes its pairs once, and a round takes a hundredth of a second.


@torch.no_grad()
def encode(prompts, images, completions):
    """Enc(x, y): mean and last hidden state of the frozen base policy, `[N, 2D]`."""
    batch = build_batch(base_processor, prompts, images, completions)
    hidden = hidden_states(base, batch)
    mask = batch.attention_mask.unsqueeze(-1)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.cat([mean, hidden[torch.arange(len(hidden)), batch.last_token]], dim=-1)


# Hidden states share a large mean, and a site that holds one class would first learn that this mean is its own. The
# server takes the mean out. It measures mean and deviation on the base policy's answers to its own prompts, so no
# site's data are in these two vectors. Without them the router needs ten times the rounds, and with unequal sites it
# sends everything to the largest one.
own = generator.sample(public, 300)
own_features = encode(
    [vqa_prompt(q.text) for q in own], [picture(q) for q in own], answers(base, base_processor, own, samples=1)
)
centre, spread = own_features.mean(dim=0), own_features.std(dim=0) + 1e-6


def features(prompts, images, completions):
    return (encode(prompts, images, completions) - centre) / spread


def encoded_pairs(site):
    """Features of chosen and rejected answers, `[n_k, 2D]`: the encoder is frozen, so once is enough."""
    drawn = generator.sample(range(len(private[site])), 200)
    questions = [private[site][i] for i in drawn]
    groups = [candidates(private[site][i], samples[site][i], 3) for i in drawn]
    return features([vqa_prompt(q.text) for q in questions], [picture(q) for q in questions], groups)


def local_steps(router, rows, k):
    """A site's half of a round: a few steps from the server's weights, on the site's own pairs, all of class k."""
    local = copy.deepcopy(router)
    optimiser = torch.optim.SGD(local.parameters(), 0.5)
    target = nn.functional.one_hot(torch.full((len(rows),), k), len(SITES)).float()
    for _ in range(5):
        optimiser.zero_grad()
        binary_cross_entropy_with_logits(local(rows), target).backward()
        optimiser.step()
    return local.state_dict()


rows_of = {site: encoded_pairs(site) for site in SITES}  # at the sites
share = {site: len(rows) / sum(map(len, rows_of.values())) for site, rows in rows_of.items()}  # n_k / Σ n_j
router = nn.Linear(len(centre), len(SITES))
for _ in range(20 if QUICK else 200):
    updates = {site: local_steps(router, rows, k) for k, (site, rows) in enumerate(rows_of.items())}
    router.load_state_dict(
        {name: sum(share[site] * update[name] for site, update in updates.items()) for name in router.state_dict()}
    )
router.requires_grad_(False)

said = answers(base, base_processor, dev, samples=1)
weights = router(features([vqa_prompt(q.text) for q in dev], [picture(q) for q in dev], said)).softmax(dim=-1)
names = list(SITES)
fits = [SITES[names[k]][0] == q.question_type for q, k in zip(dev, weights.argmax(1).tolist(), strict=True)]
say(f"router     sends {sum(fits) / len(fits):.1%} of the base policy's answers to the site of their domain")

# ----------------------------------------------------------------------------------------------------------------------
# The federation as one reward function. TRL sees nothing else of it.
#
# The router routes each answer, and only the top site is asked (MoR, section 3.4), so several sites may judge one
# group. In the package, a question to a site is a message and a site may be absent. Here it is a function call.

asked: Counter[str] = Counter()


def federation(prompts, completions, completion_ids, **_):
    """One reward per completion; TRL hands over G consecutive rows for each prompt, `[P·G]`."""
    texts = [completion[-1]["content"] for completion in completions]
    texts = [t if isinstance(t, str) else "".join(b["text"] for b in t if b["type"] == "text") for t in texts]
    said = [texts[start : start + GROUP] for start in range(0, len(texts), GROUP)]
    blocks = [{block["type"]: block for block in prompt[-1]["content"]} for prompt in prompts[::GROUP]]
    questions, images = [vqa_prompt(b["text"]["text"]) for b in blocks], [b["image"]["image"] for b in blocks]

    top = router(features(questions, images, said)).argmax(dim=-1).view(-1, GROUP)  # [P, G]
    rewards = torch.zeros(top.shape)
    for k, (site, judge) in enumerate(judges.items()):
        here = [p for p in range(len(said)) if (top[p] == k).any()]
        if here:
            routed = [[said[p][g] for g in range(GROUP) if top[p, g] == k] for p in here]
            rewards[top == k] = judge.score([questions[p] for p in here], [images[p] for p in here], routed)
        asked[site] += int((top == k).sum())
    # A completion without an end token was cut off. It is no answer, whatever score its beginning would get.
    end = base_processor.tokenizer.eos_token_id
    return [r if end in ids else 0.0 for r, ids in zip(rewards.flatten().tolist(), completion_ids, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# GRPO through the stock trainer.
#
# Prompts take the three types in turn. In the natural mixture four of five groups are yes/no, and the policy learns to
# say "no". TRL's default β is 0. The method needs its KL term: without it the policy leaves the region where the reward
# models were trained. A learning rate of 1e-3 ruins the run even with a perfect reward.

PROMPTS, GROUP = (6, 4) if QUICK else (36, 8)
STEPS = 3 if QUICK else 200

by_type = defaultdict(list)
for q in public:
    by_type[q.question_type].append(q)
turns = [generator.choice(by_type[kind]) for _ in range(STEPS * PROMPTS // 3) for kind in sorted(by_type)]
dataset = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": q.text}] for q in turns], "image": [str(q.image) for q in turns]}
).cast_column("image", ImageFeature())

policy, processor = load_model(POLICY)
with tempfile.TemporaryDirectory() as scratch:
    trainer = GRPOTrainer(
        model=policy,
        processing_class=processor,
        reward_funcs=federation,
        train_dataset=dataset,
        args=GRPOConfig(
            output_dir=scratch,
            seed=options.seed,
            max_steps=STEPS,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=MAX_TOKENS,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            beta=0.02,
            loss_type="grpo",
            shuffle_dataset=False,
            save_strategy="no",
            logging_steps=max(STEPS // 10, 1),
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
for record in trainer.state.log_history:
    if "reward" in record:
        say(f"step {record['step']:4d}  reward {record['reward']:.3f}  kl {record['kl']:.3f}")
total = sum(asked.values())
say("asked      " + "  ".join(f"{site} {count / total:.1%}" for site, count in asked.items()))

# Do not trust the gain on yes/no. Most answers there are "no", so a policy that never looks at the image reaches 82 %
# on the natural mixture. Colour and shape have no such prior.
after = accuracy(policy, processor)
say(f"base       {shown(before)}")
say(f"aligned    {shown(after)}")
