"""Chat templates that try to escape or to exhaust are refused by their tree; real ones are not."""

import pytest
from folders import make_adapter, make_model, processor_seconds, write_json

from luthier.artifacts.identify import identify
from luthier.artifacts.templates import check_template
from luthier.errors import ArtifactError

ESCAPES = [
    "{{ ''.__class__.__mro__ }}", "{{ x['__class__'] }}", "{{ x | attr('__class__') }}", "{{ [x] | map(attribute='__init__.__globals__') }}",
    "{% set a = self.__init__ %}", "{% generation %}{{ x.__globals__ }}{% endgeneration %}", "{{ '%s' | format(x.__dict__) }}",
]  # fmt: skip
EXHAUSTS = [
    "{{ 'x' * 10000000000 }}", "{{ 'x' * 10**10 }}", "{{ 2 ** 2 ** 2 ** 2 ** 9 }}", "{{ 'x' * (9999 * 9999) }}", "{{ 'x' | center(999999999) }}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "{% set ns = namespace(t='x') %}{% for i in m %}{% set ns.t = ns.t + ns.t %}{% endfor %}", "{{ 1e400 }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "x" * 2_000_000,
]  # fmt: skip
SOUND = [
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}{% endfor %}",
    "{%- set ns = namespace(found=false, last=messages|length - 1) %}{% for m in messages[::-1] %}{% set i = (messages|length - 1) - loop.index0 %}"
    "{% if ns.found %}{% set ns.found = true %}{% endif %}{% endfor %}{{ '  ' * 4 }}{{ tools | tojson(indent=4) }}",
    "{% for a in range(3) %}{% for b in messages %}{% set x = a ~ b %}{% endfor %}{% endfor %}{% generation %}a{% endgeneration %}",
    "{{ broken", "",
]  # fmt: skip


@pytest.mark.parametrize(("template", "code"), [(t, "template-escape") for t in ESCAPES] + [(t, "template-exhausts") for t in EXHAUSTS], ids=lambda value: value[:24])  # fmt: skip
def test_template_that_attacks_is_refused_quickly(template, code, tmp_path):
    begin = processor_seconds()
    with pytest.raises(ArtifactError) as caught:
        check_template(template, "x")
    assert caught.value.code == code
    for make in (make_model, make_adapter):
        folder = make(tmp_path / make.__name__)
        (folder / "chat_template.jinja").write_text(template)
        assert code in [problem.code for problem in identify(folder).faults]
        (folder / "chat_template.jinja").unlink()
        write_json(folder / "tokenizer_config.json", {"chat_template": [{"name": "default", "template": template}]})
        assert code in [problem.code for problem in identify(folder).faults]
    assert processor_seconds() - begin < 3


@pytest.mark.parametrize("template", SOUND)
def test_ordinary_template_is_left_alone(template):
    check_template(template, "x")
    check_template({"default": template}, "x")
    check_template(None, "x")
