//! Schedules expose synchronisation that is missing, and pedantic launches refuse what works only in lockstep.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{LAUNCH_FAILED, TestLaunch};
use simulator::report::last_problem;
use simulator::schedule::Schedule;

const DEFAULT: Schedule = Schedule { reversed: false, early_copies: false, pedantic: false };
const REVERSED: Schedule = Schedule { reversed: true, ..DEFAULT };
const EARLY: Schedule = Schedule { early_copies: true, ..DEFAULT };
const PEDANTIC: Schedule = Schedule { pedantic: true, ..DEFAULT };
const ALL: [Schedule; 4] = [DEFAULT, REVERSED, EARLY, Schedule { reversed: true, early_copies: true, pedantic: true }];

/// The address of this thread's word in shared memory in %r3, that of the thread `distance` away in %r4.
fn with_partner(distance: u32, body: &str) -> String {
    format!(
        "mov.u32 %r2, dynamic; shl.b32 %r3, %r1, 2; add.s32 %r3, %r2, %r3; xor.b32 %r4, %r3, {}; {body}",
        distance * 4
    )
}

fn run(schedule: Schedule, threads: u32, body: &str) -> Result<Vec<u32>, i32> {
    schedule.set();
    let words: Vec<u32> = (100..100 + threads).collect();
    TestLaunch { target: "sm_80", threads, shared_bytes: 1024, maps: &|_| vec![], words: &words, body }.run()
}

fn same_under_all_schedules(threads: u32, body: &str) {
    let expected = run(DEFAULT, threads, body).unwrap();
    for schedule in ALL {
        assert_eq!(run(schedule, threads, body).unwrap(), expected, "{schedule:?}");
    }
}

/// Fails in pedantic mode for this reason, and passes without.
fn fails_if_pedantic(schedule: Schedule, threads: u32, body: &str, reason: &str) {
    assert!(run(Schedule { pedantic: false, ..schedule }, threads, body).is_ok(), "{reason}");
    assert_eq!(run(Schedule { pedantic: true, ..schedule }, threads, body), Err(LAUNCH_FAILED), "{reason}");
    let problem = last_problem();
    assert!(problem.contains(reason), "{problem}, expected {reason}");
}

#[test]
fn the_order_of_warps_exposes_a_missing_barrier() {
    let body = |barrier| {
        with_partner(
            32,
            &format!("st.shared.u32 [%r3], %r1; {barrier} ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd1], %r5;"),
        )
    };
    same_under_all_schedules(64, &body("bar.sync 0;"));
    let first_warp_first = run(DEFAULT, 64, &body("")).unwrap();
    let last_warp_first = run(REVERSED, 64, &body("")).unwrap();
    assert_eq!((first_warp_first[0], first_warp_first[32]), (u32::MAX, 0));
    assert_eq!((last_warp_first[0], last_warp_first[32]), (32, u32::MAX));
}

#[test]
fn late_copies_expose_a_missing_wait() {
    let body = |wait| {
        let copy = format!(
            "cp.async.ca.shared.global [%r3], [%rd1], 4, 4; cp.async.commit_group; {wait} bar.sync 0;
            ld.shared.u32 %r5, [%r4]; bar.sync 0; st.global.u32 [%rd1], %r5; cp.async.wait_all;"
        );
        with_partner(32, &copy)
    };
    same_under_all_schedules(64, &body("cp.async.wait_group 0;"));
    assert_eq!(run(DEFAULT, 64, &body("")).unwrap(), [u32::MAX; 64]);
    assert_eq!(run(EARLY, 64, &body("")).unwrap()[0], 132);
}

#[test]
fn early_copies_expose_a_buffer_that_is_refilled_while_in_use() {
    // The copy goes to memory that the other warp still reads, unless that warp has passed a barrier since. It is waited for
    // later, so copies that land late hide the mistake, whatever the order of warps.
    let body = |before_copy, after_copy| {
        let copy = format!(
            "st.shared.u32 [%r3], %r1; bar.sync 0; {before_copy}
            cp.async.ca.shared.global [%r3], [%rd1], 4, 4; cp.async.commit_group;
            {after_copy} bar.sync 0; cp.async.wait_group 0; st.global.u32 [%rd1], %r5;"
        );
        with_partner(32, &copy)
    };
    same_under_all_schedules(64, &body("ld.shared.u32 %r5, [%r4]; bar.sync 0;", ""));
    let early_refill = body("", "ld.shared.u32 %r5, [%r4];");
    let late = run(DEFAULT, 64, &early_refill).unwrap();
    assert_eq!(late, run(REVERSED, 64, &early_refill).unwrap());
    let early = run(EARLY, 64, &early_refill).unwrap();
    assert_eq!((late[32], early[32]), (0, 100));
}

#[test]
fn lanes_share_memory_only_across_a_barrier() {
    let shared = |barrier| {
        with_partner(
            1,
            &format!("st.shared.u32 [%r3], %r1; {barrier} ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd1], %r5;"),
        )
    };
    for barrier in ["bar.sync 0;", "bar.warp.sync -1;"] {
        same_under_all_schedules(32, &shared(barrier));
    }
    let without_barrier = "without a barrier";
    fails_if_pedantic(DEFAULT, 32, &shared(""), without_barrier);
    // A shuffle exchanges registers; it does not order memory.
    fails_if_pedantic(DEFAULT, 32, &shared("shfl.sync.bfly.b32 %r6|%p1, %r1, 1, 31, -1;"), without_barrier);
    let overwritten =
        with_partner(1, "st.shared.u32 [%r3], %r1; bar.sync 0; ld.shared.u32 %r5, [%r4]; st.shared.u32 [%r3], %r5;");
    fails_if_pedantic(DEFAULT, 32, &overwritten, without_barrier);
    fails_if_pedantic(DEFAULT, 32, "st.global.u32 [%rd2], %r1;", without_barrier);
    let copied = "cp.async.ca.shared.global [%r3], [%rd1], 4, 4; cp.async.wait_all; ld.shared.u32 %r5, [%r4];";
    fails_if_pedantic(DEFAULT, 32, &with_partner(1, copied), without_barrier);
    fails_if_pedantic(EARLY, 32, &with_partner(1, copied), without_barrier);
    let loaded = "st.shared.u32 [%r3], %r1; and.b32 %r6, %r1, 7; shl.b32 %r6, %r6, 4; add.s32 %r6, %r6, %r2;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r6];";
    fails_if_pedantic(DEFAULT, 32, &with_partner(1, loaded), without_barrier);
}

#[test]
fn rows_of_a_matrix_are_in_different_banks() {
    let load = |shift| {
        let text = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r6]; st.global.u32 [%rd1], %r5;";
        with_partner(1, &format!("and.b32 %r6, %r1, 7; shl.b32 %r6, %r6, {shift}; add.s32 %r6, %r6, %r2; {text}"))
    };
    same_under_all_schedules(32, &load(4));
    fails_if_pedantic(DEFAULT, 32, &load(5), "bank conflict");
}

#[test]
fn all_threads_reach_a_barrier() {
    let unless = |condition| format!("{condition} @%p1 bra END; bar.sync 0; END:");
    let lane = unless("setp.eq.u32 %p1, %r1, 5; @%p1 ret;");
    fails_if_pedantic(DEFAULT, 64, &lane, "exited without reaching a barrier");
    let warp = unless("setp.gt.u32 %p1, %r1, 31; @%p1 ret;");
    fails_if_pedantic(DEFAULT, 64, &warp, "without reaching a barrier of all threads");
    fails_if_pedantic(REVERSED, 64, &warp, "without reaching a barrier of all threads");
    assert!(run(PEDANTIC, 64, "bar.sync 0;").is_ok());
}

#[test]
fn all_lanes_in_its_mask_take_part_in_a_shuffle() {
    let body = "setp.eq.u32 %p1, %r1, 5; @%p1 ret; and.b32 %r2, %r1, 31; shfl.sync.idx.b32 %r2|%p2, %r1, 0, 31, MASK;
        st.global.u32 [%rd1], %r2;";
    fails_if_pedantic(DEFAULT, 32, &body.replace("MASK", "-1"), "do not take part");
    assert!(run(PEDANTIC, 32, &body.replace("MASK", "-33")).is_ok());
    assert!(run(PEDANTIC, 4, "shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, -1;").is_ok(), "a block may have fewer lanes");
}
