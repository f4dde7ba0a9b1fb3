"""What `polyaccel plan` prints."""

from __future__ import annotations

from polyaccel.cli.plan_tables import amount, comparison, duration, mesh_text, page
from polyaccel.planned.chips import CHIPS
from polyaccel.planned.report import Collective, ProgramPlan, StepPlan

GIB = 1024**3
V5E = CHIPS["v5e"]


def plan(temporary_bytes=2 * GIB, refusal=None, parts=16):
    program = ProgramPlan(
        name="train_step of loss_fn",
        argument_bytes=4 * GIB,
        output_bytes=0,
        temporary_bytes=temporary_bytes,
        code_bytes=0,
        resident_bytes=0,
        flops=19.7e12,
        accessed_bytes=81.9e9,
        matrix_flops=9.85e12,
        compiler_s=0.2,
        compile_s=12.0,
        collectives=(Collective("all-gather", parts, 32, GIB, GIB // 2),),
    )
    return StepPlan(
        topology="v5e:4x4",
        num_devices=16,
        mesh={"data": 16 // parts, "fsdp": parts},
        num_parameters=124_439_808,
        parameter_bytes=GIB,
        buffer_bytes=0,
        optimizer_bytes=2 * GIB,
        programs=() if refusal else (program,),
        refusal=refusal,
        remarks=("one thing",),
    )


def test_a_page_says_what_a_device_needs_and_how_long_it_takes():
    text = page(plan(), V5E)
    for words in (
        "v5e:4x4, 16 devices, fsdp=16: 124,439,808 parameters",
        "38% of 16.0 GiB on v5e: fits",
        "19.7 TFLOP  9.85 TFLOP in matrix products",
        "200 ms      the compiler's estimate",
        "MFU                                25.0%",
        "all-gather  32 x among 16  1.0 GiB  512.0 MiB sent",
        "note: one thing",
    ):
        assert words in text, text


def test_a_page_of_a_refused_step_gives_the_reason_and_the_way_out():
    text = page(plan(refusal="Used 70.72G of 15.75G hbm.\nmore"), V5E)
    assert "does not fit; the compiler says:\n  Used 70.72G of 15.75G hbm." in text
    assert "--search" in text
    assert "peak" not in text


def test_temporaries_that_need_no_hbm_are_said_to_lie_elsewhere():
    assert "all in the fast memory of v5e" in page(plan(temporary_bytes=0), V5E)
    assert "fast memory" not in page(plan(), V5E)
    assert "fast memory" not in page(plan(temporary_bytes=0), None)


def test_a_comparison_names_the_nearest_that_fits():
    lines = comparison([(V5E, plan(temporary_bytes=20 * GIB, parts=4)), (V5E, plan())]).splitlines()
    assert "data=4 fsdp=4" in lines[1]
    assert " no " in lines[1]
    assert " yes " in lines[2]
    assert lines[-1] == "the nearest that fits: v5e:4x4 fsdp=16"
    assert comparison([(V5E, plan(refusal="too large"))]).endswith("none of them fits")


def test_numbers_have_units():
    assert [amount(number) for number in (12, 1.25e6, 3e15)] == ["12 ", "1.25 M", "3 P"]
    assert [duration(seconds) for seconds in (2.0, 0.0123, 4.2e-5)] == ["2 s", "12.3 ms", "42 us"]
    assert mesh_text({"data": 1, "fsdp": 1}) == "one device"
