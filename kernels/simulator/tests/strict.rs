//! Faults that a device does not report end a launch with an error, and correct code does not.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{LAUNCH_FAILED, TestLaunch};
use simulator::driver::{cuMemFree_v2, cuMemcpyHtoD_v2, cuModuleLoadData};
use std::ptr::{null, null_mut};

const NO_BINARY_FOR_GPU: i32 = 209;
const ILLEGAL_ADDRESS: i32 = 700;

fn run(threads: u32, words: &[u32], body: &str) -> Result<Vec<u32>, i32> {
    TestLaunch { target: "sm_80", threads, shared_bytes: 64, maps: &|_| vec![], words, body }.run()
}

#[test]
fn diverged_lanes_reconverge() {
    // Odd threads loop once for each bit of their number; at the end, neighbouring lanes add their counts.
    let body = "mov.u32 %r2, 0; and.b32 %r3, %r1, 1; setp.eq.s32 %p1, %r3, 0; @%p1 bra MEET; mov.u32 %r4, %r1;
        AGAIN: add.s32 %r2, %r2, 1; shr.u32 %r4, %r4, 1; setp.ne.s32 %p2, %r4, 0; @%p2 bra AGAIN; bra.uni MEET;
        MEET: shfl.sync.bfly.b32 %r5|%p3, %r2, 1, 31, -1; add.s32 %r2, %r2, %r5; st.global.u32 [%rd1], %r2;";
    let out = run(32, &[0; 32], body).unwrap();
    assert!(out.iter().enumerate().all(|(at, sum)| *sum == u32::BITS - (at as u32 | 1).leading_zeros()), "{out:?}");
}

#[test]
fn lanes_in_out_of_line_code_reach_the_shuffle_of_the_others() {
    // The code of the even lanes is behind the end, so the others reach the shuffle first and have to wait.
    let body = "and.b32 %r3, %r1, 1; mov.u32 %r2, 7; setp.eq.s32 %p1, %r3, 0; @%p1 bra ASIDE;
        MEET: shfl.sync.bfly.b32 %r5|%p3, %r2, 1, 31, -1; st.global.u32 [%rd1], %r5; ret;
        ASIDE: mov.u32 %r2, 8; bra.uni MEET;";
    let out = run(32, &[0; 32], body).unwrap();
    assert!(out.iter().enumerate().all(|(at, got)| *got == 7 + at as u32 % 2), "{out:?}");
}

#[test]
fn a_barrier_orders_shared_memory() {
    let body = "mov.u32 %r2, dynamic; shl.b32 %r3, %r1, 2; add.s32 %r3, %r2, %r3; st.shared.u32 [%r3], %r1; bar.sync 0;
        xor.b32 %r4, %r3, 4; ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd1], %r5;";
    let out = run(16, &[0; 16], body).unwrap();
    assert!(out.iter().enumerate().all(|(at, got)| *got == at as u32 ^ 1), "{out:?}");
}

#[test]
fn numbers_convert_and_round() {
    let cases = [
        ("cvt.rn.f32.s32 %f1, %r2; mov.b32 %r2, %f1;", -3i32 as u32, (-3f32).to_bits()),
        ("mov.b32 %f1, %r2; cvt.rzi.s32.f32 %r2, %f1;", (-2.7f32).to_bits(), -2i32 as u32),
        ("mov.b32 %f1, %r2; cvt.rmi.f32.f32 %f1, %f1; mov.b32 %r2, %f1;", (-2.2f32).to_bits(), (-3f32).to_bits()),
        ("mov.b32 %f1, %r2; cvt.rzi.u32.f32 %r2, %f1;", 1e20f32.to_bits(), u32::MAX),
        ("mov.b32 %f1, %r2; cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r2, %h1;", 0x3f80_8000, 0x3f80), // a tie, to even
        ("cvt.rz.f32.u32 %f1, %r2; mov.b32 %r2, %f1;", u32::MAX, 4_294_967_040f32.to_bits()),
        ("mov.b32 %f1, %r2; fma.rm.f32 %f1, %f1, %f1, %f1; mov.b32 %r2, %f1;", 0x3f80_0001, 0x4000_0001),
        ("bfi.b32 %r2, %r2, 0, 4, 8;", 0xabcd, 0xcd0),
        ("shr.s32 %r2, %r2, 40;", 0x8000_0000, u32::MAX),
        ("mov.b32 {%h1, %h2}, %r2; mov.b32 %r2, {%h2, %h1};", 0x1234_5678, 0x5678_1234),
        ("mov.b32 %f1, %r2; setp.neu.f32 %p1, %f1, %f1; selp.u32 %r2, 1, 0, %p1;", f32::NAN.to_bits(), 1),
    ];
    for (body, given, wanted) in cases {
        let out = run(1, &[given], &format!("ld.global.u32 %r2, [%rd1]; {body} st.global.u32 [%rd1], %r2;")).unwrap();
        assert_eq!(out, [wanted], "{body}");
    }
}

#[test]
fn faults_that_a_device_does_not_report_are_errors() {
    for (body, what) in [
        ("st.global.u32 [%rd1+4], %r1;", "beyond the last word"),
        ("st.global.u32 [%rd1+-4], %r1;", "before the first"),
        ("ld.global.u32 %r2, [%rd1+2];", "misaligned"),
        ("mov.u32 %r2, dynamic; st.shared.u32 [%r2+64], %r1;", "beyond shared memory"),
        (
            "setp.eq.s32 %p1, %r1, 0; @%p1 bra END; bar.sync 0; END: shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, -1;",
            "diverged forever",
        ),
        ("shfl.sync.idx.b32 %r2|%p2, %r1, 20, 31, -1;", "a lane that does not exist"),
        ("trap;", "a trap"),
        ("tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%rd1, {%r1}];", "not simulated"),
    ] {
        assert_eq!(run(4, &[0; 4], body), Err(LAUNCH_FAILED), "{what}");
    }
    // SAFETY: nothing is allocated at this address, so no memory is touched.
    unsafe {
        assert_eq!(cuMemFree_v2(256), ILLEGAL_ADDRESS);
        assert_eq!(cuMemcpyHtoD_v2(256, null(), 1), ILLEGAL_ADDRESS);
    }
}

#[test]
fn code_for_another_device_is_refused() {
    for (target, wanted) in [("sm_80", 0), ("sm_75", 0), ("sm_90", NO_BINARY_FOR_GPU), ("sm_90a", NO_BINARY_FOR_GPU)] {
        let text = std::ffi::CString::new(format!(".version 8.0\n.target {target}\n.address_size 64\n")).unwrap();
        let mut module = null_mut();
        // SAFETY: text that ends with a zero.
        assert_eq!(unsafe { cuModuleLoadData(&raw mut module, text.as_ptr()) }, wanted, "{target}");
    }
}
