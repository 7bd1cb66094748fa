"""The operators on the CPU in odd shapes, which hypothesis draws: no multiple of a vector or a block, one number
or a few more than a block, every dtype and layout."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esd_fast import ops

pytestmark = pytest.mark.usefixtures("needs_native")

# The same examples in every run, none of them timed.
drawn = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 17, 31, 33, 63, 65]))
layouts = st.sampled_from([torch.channels_last, torch.contiguous_format])


@drawn
@given(
    shape=st.tuples(st.integers(1, 3), sizes, sizes, sizes),
    groups=st.integers(1, 6),
    dtype=dtypes,
    of_parameters=dtypes,
    silu=st.booleans(),
    layout=layouts,
)
def test_group_norm_silu(make_norm_case, shape, groups, dtype, of_parameters, silu, layout):
    batch, width, *picture = shape
    if width * picture[0] * picture[1] < 16:
        picture = [4, 5]  # the variance of one or two numbers says nothing of an error
    case = make_norm_case(
        (batch, groups * width, *picture), groups, dtype, of_parameters, silu, layout=layout
    )
    case.check(ops.group_norm_silu)


@drawn
@given(rows=st.lists(sizes, max_size=2), width=st.integers(1, 1100), dtype=dtypes)
def test_geglu(make_geglu_case, rows, width, dtype):
    rows = rows[: 1 if width > 100 else 2]
    make_geglu_case((*rows, 2 * width), dtype).check(ops.geglu)


@drawn
@given(
    prompts=st.integers(2, 3),
    batch=st.integers(1, 3),
    elements=st.integers(1, 2100),
    index=st.integers(0, 10),
    dtype=dtypes,
    of_inputs=dtypes,
    keep=st.booleans(),
)
def test_guided_step(step_case, prompts, batch, elements, index, dtype, of_inputs, keep):
    step_case((prompts, batch, elements), dtype, of_inputs, index, keep).check(ops.guided_step)


@drawn
@given(batch=st.integers(1, 4), elements=st.integers(1, 5000), dtype=dtypes, of_teachers=dtypes)
def test_guidance_loss(guidance_case_of, batch, elements, dtype, of_teachers):
    guidance_case_of((batch, elements), dtype, of_teachers).check(ops.guidance_loss)
