"""Prompts as a chat template takes them, and templates without a system role."""

import pytest

from tests.helpers.tiny_painters import tiny_model
from tests.helpers.tiny_pipelines import tokenizer
from tests.helpers.tiny_unified import tiny_tokenizer
from trl_unigrpo.models.prompts import as_messages, system_ids
from trl_unigrpo.models.tokenizer import prepare_tokenizer


SYSTEM, USER = {"role": "system", "content": "think"}, {"role": "user", "content": "a cube"}
TURN = "[{{ m['role'] }}]{{ m['content'] }}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + PLAIN
FORGETS = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}"
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}" + TURN + "{% endfor %}"
)


def shown(template, messages):
    return prepare_tokenizer(tokenizer(), template).apply_chat_template(messages, tokenize=False)


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a red"}, {"type": "text", "text": "cube"}]
    message = {"role": "user", "content": parts, "name": "me"}
    assert as_messages([message], "think") == [SYSTEM, {"role": "user", "content": "a red cube", "name": "me"}]
    assert message["content"] is parts
    assert as_messages("a cube", "think") == as_messages([USER], "think") == as_messages([SYSTEM, USER], "look")
    assert as_messages("a cube", None) == as_messages("a cube", "") == [USER]


@pytest.mark.parametrize("template", [REFUSES, FORGETS, ALTERNATES])
def test_system_message_opens_the_users_turn_where_there_is_no_system_role(template):
    assert shown(template, [SYSTEM, USER]) == "[user]think\n\na cube"
    answer = {"role": "assistant", "content": "yes"}
    assert shown(template, [SYSTEM, USER, answer, USER]) == "[user]think\n\na cube[assistant]yes[user]a cube"
    assert shown(template, [USER, answer]) == "[user]a cube[assistant]yes"
    assert shown(template, [SYSTEM]) == "[user]think"  # what guidance without the prompt sees
    ready = prepare_tokenizer(tokenizer(), template)
    assert system_ids(ready, [[SYSTEM, USER]]) == [ready("[user]think", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("template", [PLAIN, tokenizer().chat_template, "{{ messages[7]['content'] }}"])
def test_other_templates_stay_as_they_are(template):
    assert prepare_tokenizer(tokenizer(), template).chat_template == template


def test_models_own_template_stays_as_it_is():
    assert prepare_tokenizer(tiny_tokenizer(), None).chat_template is None


def test_thinker_without_a_system_role_trains_and_keeps_its_template(make_trainer, train, tmp_path):
    strict = tokenizer()
    strict.chat_template = REFUSES
    trainer = make_trainer(
        model=tiny_model(),
        processing_class=strict,
        reward_funcs=lambda images, **_: [float(i) for i in range(len(images))],
        max_completion_length=4,
        max_steps=1,
    )
    trajectories = train(trainer).batches[0]["trajectories"]
    for trajectory in trajectories:
        told = f"[user]{trainer.unified.default_system_prompt}\n\n{trajectory.prompt}[assistant]"
        assert strict.decode(trajectory.prompt_ids) == told
    trainer.save_model(tmp_path)
    saved = type(strict).from_pretrained(tmp_path)
    assert saved.apply_chat_template([SYSTEM, USER], tokenize=False) == "[user]think\n\na cube"
