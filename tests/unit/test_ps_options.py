import pytest

from tfdist.config.ps_options import PS_SHARED, PsOptions
from tfdist.config.settings import check_owner
from tfdist.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ps_mode": "both"}, "ps_mode='both': choose one of async, sync"),
        ({"ps_mode": "sync", "steps_per_loop": 4}, "steps_per_loop=4 with ps_mode='sync'"),
        ({"steps_per_loop": 0}, "steps_per_loop=0: it must be 1 or more"),
        ({"max_staleness": -1}, "max_staleness=-1: it must be 0 or more"),
        ({"num_backup_workers": 1}, "num_backup_workers=1 with ps_mode='async'"),
        ({"ps_mode": "sync", "num_backup_workers": -1}, "num_backup_workers=-1: it must be 0 or more"),
        ({"staleness_lr": "half"}, "staleness_lr='half': choose one of inverse"),
    ],
)
def test_values_that_break_their_rule_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PsOptions(**options)


def test_only_ps_has_them():
    check_owner(PsOptions(steps_per_loop=2), "mirrored", owner="ps", shared=PS_SHARED)
    check_owner(PsOptions(max_staleness=2), "ps", owner="ps", shared=PS_SHARED)
    with pytest.raises(ConfigError, match="max_staleness=2 with strategy='mirrored': only 'ps' has it"):
        check_owner(PsOptions(max_staleness=2), "mirrored", owner="ps", shared=PS_SHARED)
