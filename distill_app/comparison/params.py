"""The `compare` section of params.yaml."""

from pydantic import Field

from distill_app.core.params import Section


class CompareParams(Section):
    """What a student must reach to replace its teacher."""

    min_retention: float = Field(ge=0)  # of the teacher's chrF (System 1) or right answers (System 2)
    min_speedup: float = Field(ge=0)  # times the teacher's speed, one prompt at a time
    min_multi_step: float = Field(ge=0, le=1)  # share of System 2's answers with two steps or more
    fail_below: bool  # end the stage with an error where a figure is below, whatever its interval
