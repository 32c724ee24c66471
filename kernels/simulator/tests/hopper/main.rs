//! Bulk tensor copies, mbarriers and `wgmma`, on a device of compute capability 9.0.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod wgmma;

use common::{EncodedMap, LAUNCH_FAILED, TestLaunch};
use simulator::device::choose;
use simulator::driver::cuTensorMapEncodeTiled;
use simulator::report::last_problem;
use simulator::schedule::Schedule;

/// A tensor of 16-bit elements, and the box to copy from it.
#[derive(Clone)]
struct Tensor {
    sizes: Vec<u64>,
    box_sizes: Vec<u32>,
    swizzle: i32,
}

impl Tensor {
    fn new(sizes: &[u64], box_sizes: &[u32], swizzle: i32) -> Self {
        Self { sizes: sizes.to_vec(), box_sizes: box_sizes.to_vec(), swizzle }
    }

    fn strides(&self) -> Vec<u64> {
        (1..self.sizes.len()).map(|axis| 2 * self.sizes[..axis].iter().product::<u64>()).collect()
    }

    fn encode(&self, address: u64, strides: &[u64]) -> Result<EncodedMap, i32> {
        let (mut map, rank) = (EncodedMap([0; 128]), self.sizes.len());
        // SAFETY: all arrays have `rank` elements or more.
        let status = unsafe {
            let (sizes, box_sizes, steps) = (self.sizes.as_ptr(), self.box_sizes.as_ptr(), [1; 5].as_ptr());
            let (to, address) = ((&raw mut map).cast(), address as *mut _);
            let strides = strides.as_ptr();
            cuTensorMapEncodeTiled(to, 9, rank as u32, address, sizes, strides, box_sizes, steps, 0, self.swizzle, 2, 0)
        };
        if status == 0 { Ok(map) } else { Err(status) }
    }

    fn map(&self, address: u64) -> EncodedMap {
        self.encode(address, &self.strides()).unwrap()
    }

    fn bytes(&self) -> u32 {
        2 * self.box_sizes.iter().product::<u32>()
    }

    /// The element at these coordinates: zero outside.
    fn element(&self, numbers: &[u16], coordinates: &[i64]) -> u16 {
        let mut at = 0;
        for (coordinate, size) in coordinates.iter().zip(&self.sizes).rev() {
            if !(0..*size as i64).contains(coordinate) {
                return 0;
            }
            at = at * *size as usize + *coordinate as usize;
        }
        numbers[at]
    }
}

fn run(threads: u32, words: &[u32], maps: &dyn Fn(u64) -> Vec<EncodedMap>, body: &str) -> Result<Vec<u32>, i32> {
    assert!(choose(90));
    TestLaunch { target: "sm_90a", threads, shared_bytes: 96 << 10, maps, words, body }.run()
}

/// Expects a launch to fail for this reason.
fn fails(threads: u32, words: &[u32], maps: &dyn Fn(u64) -> Vec<EncodedMap>, body: &str, reason: &str) {
    assert_eq!(run(threads, words, maps, body), Err(LAUNCH_FAILED), "{reason}");
    let problem = last_problem();
    assert!(problem.contains(reason), "{problem}, expected {reason}");
}

fn packed(numbers: &[u16]) -> Vec<u32> {
    numbers.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect()
}

/// Thread 0 issues copies, of `(map, coordinates, destination)`, and all threads wait for them. %r10 is the address of
/// shared memory, %r11 the mbarrier's, and %p1 is set in all threads but 0.
fn copies(copies: &[(usize, &str, u32)], bytes: u32) -> String {
    let begin = begin_copies(copies, bytes);
    format!("{begin} WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r11], 0; @!%p2 bra WAIT;")
}

fn begin_copies(copies: &[(usize, &str, u32)], bytes: u32) -> String {
    let copy = |(map, coordinates, to): &(usize, &str, u32)| {
        let rank = coordinates.split(',').count();
        format!(
            "mov.b64 %rd10, kernel_param_{map}; cvta.param.u64 %rd11, %rd10; add.s32 %r12, %r10, {to};
            cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [%r12], [%rd11, {{{coordinates}}}], [%r11];"
        )
    };
    format!(
        "mov.u32 %r10, dynamic; add.s32 %r11, %r10, 90000; setp.ne.s32 %p1, %r1, 0; @%p1 bra MADE;
        mbarrier.init.shared::cta.b64 [%r11], 1; fence.mbarrier_init.release.cluster;
        MADE: bar.sync 0; @%p1 bra BEGUN;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], {bytes}; {} BEGUN:",
        copies.iter().map(copy).collect::<String>()
    )
}

/// Copies `rows` of 128 bytes of shared memory behind the first `behind` words; each of 32 threads stores a word of a row.
fn store_rows(rows: u32, behind: usize, swizzled: bool) -> String {
    let row = |row| {
        let swizzle = if swizzled { "xor.b32 %r13, %r13, %r14;" } else { "" };
        format!(
            "shl.b32 %r13, %r1, 2; mov.u32 %r14, {}; {swizzle} add.s32 %r13, %r13, %r10;
            ld.shared.u32 %r15, [%r13+{}]; st.global.u32 [%rd1+{}], %r15;",
            row % 8 * 16,
            row * 128,
            behind * 4 + row as usize * 128
        )
    };
    (0..rows).map(row).collect()
}

#[test]
fn a_box_is_copied_and_elements_outside_are_zero() {
    for (tensor, first) in [
        (Tensor::new(&[64, 20], &[64, 16], 3), [0, 8, 0, 0]),
        (Tensor::new(&[64, 20], &[64, 16], 0), [8, -3, 0, 0]),
        (Tensor::new(&[72, 20], &[64, 8], 3), [-8, 4, 0, 0]),
        (Tensor::new(&[64, 3, 5, 2], &[64, 2, 4, 1], 3), [0, 1, 2, 1]),
        (Tensor::new(&[64, 3, 5, 2], &[64, 1, 3, 2], 0), [-64, 1, 2, 0]),
    ] {
        let numbers: Vec<u16> = (1..=tensor.sizes.iter().product::<u64>() as u16).collect();
        let rank = tensor.sizes.len();
        let (mut words, rows) = (packed(&numbers), tensor.bytes() / 128);
        let behind = words.len();
        words.resize(behind + 32 * rows as usize, 7);
        let text: Vec<String> = first[..rank].iter().map(i64::to_string).collect();
        let body = copies(&[(1, &text.join(", "), 1024)], tensor.bytes());
        let body = format!("{body} add.s32 %r10, %r10, 1024; {}", store_rows(rows, behind, tensor.swizzle != 0));
        let out = run(32, &words, &|address| vec![tensor.map(address)], &body).unwrap();
        let mut wanted = Vec::new();
        for at in 0..i64::from(tensor.bytes() / 2) {
            let (mut rest, mut coordinates) = (at, Vec::new());
            for (size, from) in tensor.box_sizes.iter().zip(&first) {
                coordinates.push(from + rest % i64::from(*size));
                rest /= i64::from(*size);
            }
            wanted.push(tensor.element(&numbers, &coordinates));
        }
        assert_eq!(out[behind..], packed(&wanted), "{:?} at {first:?}", tensor.sizes);
    }
}

#[test]
fn a_copy_that_is_not_waited_for_is_nan() {
    let tensor = Tensor::new(&[64, 1], &[64, 1], 0);
    let words = [5; 64];
    let maps = |address| vec![tensor.map(address)];
    let begin = begin_copies(&[(1, "0, 0", 0)], 128);
    let wait = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r11], 0; @!%p2 bra WAIT;";
    let early = run(32, &words, &maps, &format!("{begin} {} {wait}", store_rows(1, 32, false))).unwrap();
    assert_eq!(early[32..], [u32::MAX; 32]);
    let late = run(32, &words, &maps, &format!("{begin} {wait} {}", store_rows(1, 32, false))).unwrap();
    assert_eq!(late[32..], [5; 32]);
    Schedule { early_copies: true, ..Schedule::default() }.set();
    let landed = run(32, &words, &maps, &format!("{begin} {} {wait}", store_rows(1, 32, false))).unwrap();
    assert_ne!(landed[32..], early[32..], "copies that land early show that the wait is missing");
    let waited = run(32, &words, &maps, &format!("{begin} {wait} {}", store_rows(1, 32, false))).unwrap();
    assert_eq!(waited, late);
    Schedule::default().set();
    fails(32, &words, &maps, &begin, "is still pending when the block ends");
}

#[test]
fn invalid_copies_are_errors() {
    let tensor = Tensor::new(&[64, 8], &[64, 8], 3);
    let (words, maps) = ([0; 256], |address| vec![tensor.map(address)]);
    let at = |to| copies(&[(1, "0, 0", to)], 1024);
    fails(32, &words, &maps, &at(512), "not a multiple of 1024");
    fails(32, &words, &maps, &at(96 << 10), "outside of 98304 bytes");
    fails(32, &words, &maps, &copies(&[(1, "0, 0, 0", 0)], 1024), "has 2 dimensions");
    fails(32, &words, &maps, &copies(&[(1, "0, 0", 0), (1, "0, 0", 0)], 2048), "to the same place is pending");
    fails(32, &words, &maps, &copies(&[(1, "0, 0", 0)], 1008), "lacks 0 arrivals and -16 bytes");
    fails(32, &words, &|_| vec![EncodedMap([1; 128])], &at(0), "there is no tensor map");
    fails(32, &words[..128], &maps, &at(0), "is not allocated");
}

#[test]
fn invalid_tensor_maps_are_refused() {
    assert!(choose(90));
    let good = Tensor::new(&[64, 8], &[64, 8], 3);
    assert!(good.encode(256, &[128]).is_ok());
    for (address, stride, box_sizes, swizzle) in [
        (264, 128, [64, 8], 3),
        (256, 136, [64, 8], 3),
        (256, 1 << 40, [64, 8], 3),
        (256, 128, [64, 257], 3),
        (256, 128, [64, 0], 3),
        (256, 128, [128, 8], 3),
        (256, 128, [4, 8], 0),
        (256, 128, [64, 8], 2),
    ] {
        let tensor = Tensor { box_sizes: box_sizes.to_vec(), swizzle, ..good.clone() };
        assert_eq!(tensor.encode(address, &[stride]).err(), Some(1), "{address} {stride} {box_sizes:?} {swizzle}");
    }
}

#[test]
fn arguments_have_addresses() {
    let body = "mov.b64 %rd10, kernel_param_1; cvta.param.u64 %rd11, %rd10; ld.u32 %r2, [%rd11+4];
        ld.param.u32 %r3, [%rd10+8]; add.s32 %r2, %r2, %r3; st.global.u32 [%rd1], %r2; prefetch.tensormap [%rd11];";
    let mut map = EncodedMap([0; 128]);
    (map.0[4], map.0[8]) = (5, 6);
    let maps = |_| vec![map.clone()];
    assert_eq!(run(1, &[0], &maps, body).unwrap(), [11]);
    let write = "mov.b64 %rd10, kernel_param_1; cvta.param.u64 %rd11, %rd10; st.u32 [%rd11], %r1;";
    fails(1, &[0], &maps, write, "kernel arguments are read-only");
}

#[test]
fn one_lane_is_elected_and_some_warps_synchronize() {
    let elect = "mov.u32 %r2, 0; elect.sync %r3|%p1, -1; @%p1 mov.u32 %r2, 100; add.s32 %r2, %r2, %r3;
        st.global.u32 [%rd1], %r2;";
    let out = run(32, &[7; 32], &|_| vec![], elect).unwrap();
    assert_eq!(out, [&[100][..], &[0; 31]].concat());
    // The first warp waits for what the second one writes; the third takes no part.
    let two_warps = "mov.u32 %r10, dynamic; mov.u32 %r6, 1; setp.gt.u32 %p1, %r1, 63; @%p1 bra END;
        setp.gt.u32 %p2, %r1, 31; @%p2 bra SECOND;
        bar.sync %r6, 64; ld.shared.u32 %r2, [%r10]; st.global.u32 [%rd1], %r2; bra END;
        SECOND: mov.u32 %r2, 9; st.shared.u32 [%r10], %r2; bar.arrive 1, 64; END:";
    let out = run(96, &[7; 96], &|_| vec![], two_warps).unwrap();
    assert_eq!(out, [[9; 32], [7; 32], [7; 32]].concat());
    fails(32, &[0; 32], &|_| vec![], "bar.sync 1, 64;", "deadlock: warp 0");
    fails(32, &[0; 32], &|_| vec![], "bar.sync 1, 48;", "not a multiple of the warp size");
    fails(
        64,
        &[0; 64],
        &|_| vec![],
        "and.b32 %r2, %r1, 32; add.s32 %r2, %r2, 64; bar.sync 1, %r2;",
        "other warps wait",
    );
}

/// Lane 0 of the first warp fills two stages in turn, and the second warp adds up what it finds there.
#[test]
fn a_producer_and_a_consumer_share_two_stages() {
    const TILES: u32 = 7;
    let tensor = Tensor::new(&[64, u64::from(TILES)], &[64, 1], 0);
    let words: Vec<u32> = (0..TILES * 32).chain([0; 64]).collect();
    let wait = |barrier: &str, parity: &str| {
        format!(
            "{{ .reg .pred P1; LAB_WAIT: mbarrier.try_wait.parity.shared::cta.b64 P1, [{barrier}], {parity};
            @P1 bra DONE; bra LAB_WAIT; DONE: }}"
        )
    };
    // Stages of 128 bytes; the mbarriers for full stages are at 1024, those for empty ones at 1040.
    let step = "and.b32 %r3, %r2, 1; shl.b32 %r4, %r3, 7; add.s32 %r4, %r4, %r10; shl.b32 %r5, %r3, 3;
        add.s32 %r5, %r5, %r10; add.s32 %r6, %r5, 1040; add.s32 %r5, %r5, 1024; shr.u32 %r7, %r2, 1; and.b32 %r7, %r7, 1;";
    let next = format!("add.s32 %r2, %r2, 1; setp.lt.u32 %p4, %r2, {TILES}; @%p4 bra");
    let body = format!(
        "mov.u32 %r10, dynamic; mov.u32 %r2, 0; setp.ne.s32 %p1, %r1, 0; @%p1 bra MADE;
        mbarrier.init.shared::cta.b64 [%r10+1024], 1; mbarrier.init.shared::cta.b64 [%r10+1032], 1;
        mbarrier.init.shared::cta.b64 [%r10+1040], 32; mbarrier.init.shared::cta.b64 [%r10+1048], 32;
        MADE: bar.sync 0; setp.gt.u32 %p2, %r1, 31; @%p2 bra CONSUME; @%p1 bra END;
        mov.b64 %rd10, kernel_param_1; cvta.param.u64 %rd11, %rd10;
        PRODUCE: {step} xor.b32 %r7, %r7, 1; {}
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint
            [%r4], [%rd11, {{0, %r2}}], [%r5], %rd3;
        {next} PRODUCE; bra END;
        CONSUME: mov.u32 %r8, 0; and.b32 %r9, %r1, 31; shl.b32 %r9, %r9, 2;
        AGAIN: {step} {} add.s32 %r4, %r4, %r9; ld.shared.u32 %r11, [%r4]; add.s32 %r8, %r8, %r11;
        mbarrier.arrive.shared::cta.b64 %rd4, [%r6];
        {next} AGAIN; st.global.u32 [%rd1+{}], %r8; END:",
        wait("%r6", "%r7"),
        wait("%r5", "%r7"),
        TILES * 128
    );
    let maps = |address| vec![tensor.map(address)];
    let out = run(64, &words, &maps, &body).unwrap();
    let wanted: Vec<u32> = (0..32).map(|lane| (0..TILES).map(|tile| tile * 32 + lane).sum()).collect();
    assert_eq!(out[TILES as usize * 32 + 32..], wanted);
    // If the consumer does not arrive, both wait forever.
    let stuck = body.replace("mbarrier.arrive.shared::cta.b64 %rd4, [%r6];", "");
    fails(64, &words, &maps, &stuck, "deadlock: warp 0, lanes 0x1 at `mbarrier.try_wait");
}

/// The first warp arrives before it writes, so the second one, which waits for that, must not see the value.
#[test]
fn a_write_after_the_arrival_is_not_visible() {
    let body = "mov.u32 %r10, dynamic; setp.ne.s32 %p1, %r1, 0; @%p1 bra MADE;
        mbarrier.init.shared::cta.b64 [%r10], 1;
        MADE: bar.sync 0; setp.gt.u32 %p2, %r1, 31; @%p2 bra WAIT; @%p1 bra END;
        mbarrier.arrive.shared::cta.b64 _, [%r10]; mov.u32 %r2, 7; st.shared.u32 [%r10+16], %r2; bra END;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0; @!%p2 bra WAIT;
        ld.shared.u32 %r2, [%r10+16]; st.global.u32 [%rd1], %r2; END:";
    assert_eq!(run(64, &[0; 64], &|_| vec![], body).unwrap()[32..], [u32::MAX; 32]);
}

#[test]
fn misused_mbarriers_are_errors() {
    let with = |body: &str| format!("mov.u32 %r10, dynamic; mbarrier.init.shared::cta.b64 [%r10], 1; {body}");
    for (body, reason) in [
        ("mbarrier.arrive.shared::cta.b64 _, [%r10+8];", "is not an mbarrier"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r10+4];", "not an aligned 8-byte word"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r10], 2;", "2 arrivals, but phase 0 expects only 1"),
        ("mbarrier.init.shared::cta.b64 [%r10], 1;", "is an mbarrier already"),
        ("mbarrier.inval.shared::cta.b64 [%r10]; mbarrier.arrive.shared::cta.b64 _, [%r10];", "is not an mbarrier"),
        ("mbarrier.expect_tx.shared::cta.b64 [%r10], 1048576;", "more than an mbarrier can count"),
        ("mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r10], 2;", "2 is not a parity"),
        (
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 16; mbarrier.arrive.shared::cta.b64 _, [%r10];",
            "1 arrivals, but phase 0 expects only 0",
        ),
        (
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 16;
            WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r10], 0; @!%p1 bra WAIT;",
            "deadlock: warp 0, lanes 0x1 at `mbarrier.try_wait",
        ),
        ("setmaxnreg.inc.sync.aligned.u32 20;", "not a multiple of 8"),
    ] {
        fails(1, &[0], &|_| vec![], &with(body), reason);
    }
    // The first phase is complete and the second is not; the one before the first counts as complete.
    let tests = "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r10], 1; mbarrier.arrive.shared::cta.b64 _, [%r10];
        mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r10], 0; mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r10], 1;
        selp.b32 %r2, 1, 0, %p1; selp.b32 %r3, 2, 0, %p2; selp.b32 %r4, 4, 0, %p3;
        add.s32 %r2, %r2, %r3; add.s32 %r2, %r2, %r4; st.global.u32 [%rd1], %r2;";
    assert_eq!(run(1, &[0], &|_| vec![], &with(tests)).unwrap(), [3]);
}
