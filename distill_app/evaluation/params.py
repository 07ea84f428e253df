"""The `compare` section of params.yaml."""

from pydantic import Field

from distill_app.core.params import Section


class StudentTargets(Section):
    """What a student must reach to replace its teacher."""

    max_points_lost: float = Field(gt=0, le=100)  # right answers and benchmarks: the non-inferiority margin
    min_speedup: float = Field(ge=0)  # times as fast as the teacher, seconds an answer, one at a time


class System1Targets(StudentTargets):
    """System 1's, which is to answer as its teacher does."""

    min_fidelity: float = Field(ge=0, le=1)  # share of the way from floor to ceiling
    min_win_rate: float = Field(ge=0, le=1)  # against the teacher before a judge, at equal length


class System2Targets(StudentTargets):
    """System 2's, which is to reason."""

    min_multi_step: float = Field(ge=0, le=1)  # share of its answers with two steps or more


class CompareParams(Section):
    """What each student must reach, and whether a run fails that does not."""

    system1: System1Targets
    system2: System2Targets
    fail_below: bool  # end the stage with an error where a figure is below, whatever its interval
