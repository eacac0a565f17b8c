"""A setting is said once: its field has the default, the rule and the words, and all else follows."""

import dataclasses

import pytest

from tfdist.commands.flags import define_flags
from tfdist.config.ps_options import PsOptions
from tfdist.config.run_config import RunConfig
from tfdist.config.settings import check_settings, setting, settings_of
from tfdist.config.sync_options import SyncOptions
from tfdist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    size: int = setting(2, least=1, help="Of a batch.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Base):
    kind: str | None = setting(None, choices=("plain", "fine"), help="Which.")
    rate: float = setting(0.5, above=0, help="How fast.")
    other: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        check_settings(self)


def test_a_class_tells_its_own_settings_first():
    assert list(settings_of(Own)) == ["kind", "rate", "size"]
    assert settings_of(Own)["size"][1].help == "Of a batch."


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 0}, "size=0: it must be 1 or more."),
        ({"size": True}, "size=True: it must be a whole number."),
        ({"size": 1.5}, "size=1.5: it must be a whole number."),
        ({"kind": "plein"}, r"kind='plein': choose one of plain, fine. Did you mean 'plain'\?"),
        ({"kind": 3}, "kind=3: it must be text or null."),
        ({"rate": 0}, "rate=0: it must be more than 0."),
        ({"rate": float("nan")}, "rate=nan: it must be more than 0."),
        ({"rate": float("inf")}, "rate=inf: it must be more than 0."),
    ],
)
def test_rules_hold(values, words):
    with pytest.raises(ConfigError, match=words):
        Own(**values)


def test_what_keeps_the_rules_is_taken():
    own = Own(size=1, kind="fine", rate=1)
    assert (own.size, own.kind, own.rate) == (1, "fine", 1)


def test_every_setting_has_a_flag_of_its_own_default():
    flags = define_flags()
    names = {"overrides": "set"}
    for name, (field, rule) in settings_of(RunConfig).items():
        flag = flags[names.get(name, name)]
        assert rule.help.rstrip(".") in " ".join(flag.help.split()), name
        # What the environment, the recipe or an earlier run may say is None until they were asked.
        if field.default is not dataclasses.MISSING and flag.default is not None:
            assert flag.default in (
                field.default,
                list(field.default) if name == "overrides" else field.default,
            )


def test_a_config_has_the_options_of_what_it_is_made_of():
    for kind in (SyncOptions, PsOptions):
        assert set(settings_of(kind)) <= set(settings_of(RunConfig))
    config = RunConfig(
        recipe="r", global_batch_size=4, epochs=1, run_dir="x", strategy="ps", num_ps=1, max_staleness=2
    )
    assert config.ps_options == PsOptions(max_staleness=2)
    assert config.sync_options == SyncOptions()
    assert RunConfig.from_json(config.to_json()) == config
