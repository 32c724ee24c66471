//! Products of warpgroups against plain ones.

use crate::common::Map;
use crate::{Tensor, copies, fails, pairs, run};
use half::{bf16, f16};

/// A product of 64 x 16 and 16 x `columns`: the left factor in registers or in shared memory.
#[derive(Clone, Copy, Debug)]
struct Product {
    format: &'static str,
    columns: usize,
    left: Option<bool>,
    right: bool,
}

/// What a factor is copied from: rows of 64 along the depth, of which 16 to 31 are multiplied, or 16 transposed ones.
fn tensor(count: usize, transposed: bool) -> Tensor {
    if transposed {
        Tensor::new(&[count as u64, 16], &[64, 16], 3)
    } else {
        Tensor::new(&[64, count as u64], &[64, count as u32], 3)
    }
}

impl Product {
    fn tensors(&self) -> [Tensor; 2] {
        [tensor(64, self.left.unwrap_or(false)), tensor(self.columns, self.right)]
    }

    fn numbers(&self) -> Vec<u16> {
        let count: u64 = self.tensors().iter().flat_map(|one| [one.sizes.iter().product::<u64>()]).sum();
        let number = |at: u64| ((at * 7 + at / 13 * 5 + at / 64) % 9) as f32 - 4.0;
        let bits = |at| {
            if self.format == "f16" {
                f16::from_f32(number(at)).to_bits()
            } else {
                bf16::from_f32(number(at)).to_bits()
            }
        };
        (0..count).map(bits).collect()
    }

    /// Of row and column.
    fn wanted(&self, numbers: &[u16]) -> Vec<f32> {
        let [left, right] = self.tensors();
        let count = left.sizes.iter().product::<u64>() as usize;
        let (left_numbers, right_numbers) = numbers.split_at(count);
        let number = |tensor: &Tensor, numbers: &[u16], transposed, at: usize, k: usize| {
            let place = if transposed { [at as i64, k as i64] } else { [k as i64 + 16, at as i64] };
            let bits = tensor.number(numbers, &place);
            if self.format == "f16" { f16::from_bits(bits).to_f32() } else { bf16::from_bits(bits).to_f32() }
        };
        let sum = |row, column| {
            let product = |k| {
                number(&left, left_numbers, self.left == Some(true), row, k)
                    * number(&right, right_numbers, self.right, column, k)
            };
            (0..16).map(product).sum::<f32>()
        };
        (0..64 * self.columns).map(|at| sum(at / self.columns, at % self.columns)).collect()
    }

    /// The copies of a factor, to `to`.
    fn boxes(map: usize, tensor: &Tensor, transposed: bool, to: u32) -> Vec<(usize, &'static str, u32)> {
        let second = (map, "64, 0", to + 2048);
        let first = (map, "0, 0", to);
        if transposed && tensor.sizes[0] == 128 { vec![first, second] } else { vec![first] }
    }

    /// %rd of this number describes a factor at `to`.
    fn descriptor(register: u32, transposed: bool, to: u32) -> String {
        let (slice, leading) = if transposed { (0, 2048 >> 4) } else { (32, 1) };
        let fixed = 1u64 << 62 | (1024 >> 4) << 32 | leading << 16;
        format!(
            "add.s32 %r13, %r10, {}; shr.u32 %r13, %r13, 4; cvt.u64.u32 %rd{register}, %r13; or.b64 %rd{register}, %rd{register}, {fixed};",
            to + slice
        )
    }

    fn sums(&self) -> String {
        (0..self.columns / 2).map(|at| format!("%f{at}")).collect::<Vec<_>>().join(", ")
    }

    /// The instruction, which adds or does not.
    fn multiply(&self, adds: u32) -> String {
        let Self { format, columns, .. } = self;
        let (left, flags) = match self.left {
            Some(transposed) => ("%rd20", format!("{}, {}", u32::from(transposed), u32::from(self.right))),
            None => ("{%r20, %r21, %r22, %r23}", u32::from(self.right).to_string()),
        };
        format!(
            "{{ .reg .pred p; mov.u32 %r13, {adds}; setp.ne.b32 p, %r13, 0;
            wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{format}.{format} {{{}}}, {left}, %rd21, p, 1, 1, {flags}; }}",
            self.sums()
        )
    }

    /// Copies, descriptors, and the fragment of the left factor if it is in registers; sums begin as numbers.
    fn begin(&self) -> String {
        let [left, right] = self.tensors();
        let mut boxes = Self::boxes(2, &right, self.right, 16384);
        if let Some(transposed) = self.left {
            boxes.extend(Self::boxes(1, &left, transposed, 0));
        }
        let bytes = boxes.iter().map(|one| if one.0 == 1 { left.bytes() } else { right.bytes() }).sum();
        let mut text = copies(&boxes, bytes);
        text += &Self::descriptor(20, self.left == Some(true), 0);
        text += &Self::descriptor(21, self.right, 16384);
        // Row 16 warp + lane / 4 of 32 words, from word 8 on.
        text += "shr.u32 %r13, %r1, 5; shl.b32 %r13, %r13, 4; and.b32 %r14, %r1, 31; shr.u32 %r14, %r14, 2;
            add.s32 %r13, %r13, %r14; shl.b32 %r13, %r13, 7; and.b32 %r14, %r1, 3; shl.b32 %r14, %r14, 2;
            add.s32 %r13, %r13, %r14; cvt.u64.u32 %rd12, %r13; add.s64 %rd12, %rd12, %rd2;";
        if self.left.is_none() {
            text += "ld.global.u32 %r20, [%rd12+32]; ld.global.u32 %r21, [%rd12+1056];
                ld.global.u32 %r22, [%rd12+48]; ld.global.u32 %r23, [%rd12+1072];";
        }
        text + &(0..self.columns / 2).map(|at| format!("mov.f32 %f{at}, 0f40000000;")).collect::<String>()
    }

    /// Stores sums to behind so many words.
    fn give(&self, behind: usize) -> String {
        let own = self.columns / 2;
        let mut text = format!("mul.wide.u32 %rd13, %r1, {}; add.s64 %rd13, %rd13, %rd2;", own * 4);
        for at in 0..own {
            text += &format!("st.global.f32 [%rd13+{}], %f{at};", (behind + at) * 4);
        }
        text
    }

    fn words(&self) -> (Vec<u32>, usize) {
        let mut words = pairs(&self.numbers());
        let behind = words.len();
        words.resize(behind + 64 * self.columns, 0);
        (words, behind)
    }

    fn maps(&self) -> impl Fn(u64) -> Vec<Map> {
        let [left, right] = self.tensors();
        move |address| vec![left.map(address), right.map(address + 2 * left.sizes.iter().product::<u64>())]
    }

    /// What is in the sums after this is done, by row and column.
    fn run(&self, body: &str) -> Vec<f32> {
        let (words, behind) = self.words();
        let out = run(128, &words, &self.maps(), &format!("{} {body} {}", self.begin(), self.give(behind))).unwrap();
        let mut sums = vec![0.0; 64 * self.columns];
        for (at, bits) in out[behind..].iter().enumerate() {
            let (thread, register) = (at / (self.columns / 2), at % (self.columns / 2));
            let row = thread / 32 * 16 + thread % 32 / 4 + register / 2 % 2 * 8;
            sums[row * self.columns + register / 4 * 8 + thread % 4 * 2 + register % 2] = f32::from_bits(*bits);
        }
        sums
    }

    fn fails(&self, body: &str, reason: &str) {
        fails(128, &self.words().0, &self.maps(), &format!("{} {body}", self.begin()), reason);
    }
}

const FENCE: &str = "wgmma.fence.sync.aligned;";
const WAIT: &str = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;";

#[test]
fn products_of_warpgroups_are_those_of_matrices() {
    for format in ["f16", "bf16"] {
        for (columns, left, right) in
            [(64, None, false), (128, None, true), (8, None, false), (64, Some(false), true), (128, Some(true), false)]
        {
            let product = Product { format, columns, left, right };
            let wanted = product.wanted(&product.numbers());
            let once = product.run(&format!("{FENCE} {} {WAIT}", product.multiply(0)));
            assert_eq!(once, wanted, "{product:?}");
            // Two that add, in groups of their own, to sums that begin as 2; what is waited for first is not yet there.
            let add = product.multiply(1);
            let twice = product.run(&format!(
                "{FENCE} {add} wgmma.commit_group.sync.aligned; {add} wgmma.commit_group.sync.aligned;
                wgmma.wait_group.sync.aligned 1; wgmma.wait_group.sync.aligned 0;"
            ));
            assert!(twice.iter().zip(&wanted).all(|(got, once)| *got == 2.0 + 2.0 * once), "{product:?}");
            let minus = product.run(&format!("{FENCE} {} {WAIT}", add.replace("p, 1, 1", "p, -1, 1")));
            assert!(minus.iter().zip(&wanted).all(|(got, once)| *got == 2.0 - once), "{product:?}");
        }
    }
}

#[test]
fn what_changes_while_a_product_is_under_way_is_an_error() {
    let product = Product { format: "bf16", columns: 64, left: None, right: false };
    let multiply = product.multiply(1);
    let unread = product.run(&format!("{FENCE} {multiply} mov.b32 %r2, %f0; {WAIT} mov.b32 %f0, %r2;"));
    assert!(unread[0].is_nan() && !unread[1].is_nan());
    for (body, reason) in [
        (format!("{FENCE} {multiply} mov.u32 %r21, 0; {WAIT}"), "the left factor changed"),
        (format!("{FENCE} {multiply} st.shared.u32 [%r10+16416], %r21; {WAIT}"), "the right factor changed"),
        (format!("{FENCE} {multiply} mov.f32 %f3, 0f00000000; {WAIT}"), "an accumulator changed"),
        (format!("{FENCE} mov.f32 %f3, 0f00000000; {multiply} {WAIT}"), "register 3 of the sums was written without"),
        (format!("{FENCE} mov.u32 %r21, 0; {multiply} {WAIT}"), "register 1 of the left factor was written without"),
        (format!("{multiply} {WAIT}"), "was written without"),
        (format!("{FENCE} {multiply} wgmma.commit_group.sync.aligned;"), "did not wait for it"),
        (
            format!("{FENCE} setp.gt.u32 %p3, %r1, 95; @%p3 bra END; {multiply} {WAIT} END:"),
            "began Some(0) and Some(1)",
        ),
        (format!("{FENCE} @!%p1 bra END; {multiply} {WAIT} END:"), "not all lanes"),
        (format!("or.b64 %rd21, %rd21, {}; {FENCE} {multiply} {WAIT}", 1u64 << 49), "no multiple of 1024"),
        (format!("and.b64 %rd21, %rd21, {}; {FENCE} {multiply} {WAIT}", (1u64 << 62) - 1), "without a swizzle"),
        (format!("cvt.u64.u32 %rd9, %r1; add.s64 %rd21, %rd21, %rd9; {FENCE} {multiply} {WAIT}"), "where others have"),
    ] {
        product.fails(&body, reason);
    }
}
