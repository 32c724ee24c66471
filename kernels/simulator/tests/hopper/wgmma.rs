//! `wgmma` against plain matrix products.

use crate::common::EncodedMap;
use crate::{Tensor, copies, fails, packed, run};
use half::{bf16, f16};

/// A product of 64 x 16 and 16 x `columns`. `left` and `right` say whether that matrix is transposed; the left one is in
/// registers if that is none.
#[derive(Clone, Copy, Debug)]
struct WgmmaCase {
    format: &'static str,
    columns: usize,
    left: Option<bool>,
    right: bool,
}

/// The tensor that holds a matrix: rows of 64 along the depth, of which 16 to 31 are multiplied, or 16 rows if transposed.
fn tensor(count: usize, transposed: bool) -> Tensor {
    if transposed {
        Tensor::new(&[count as u64, 16], &[64, 16], 3)
    } else {
        Tensor::new(&[64, count as u64], &[64, count as u32], 3)
    }
}

impl WgmmaCase {
    fn tensors(&self) -> [Tensor; 2] {
        [tensor(64, self.left.unwrap_or(false)), tensor(self.columns, self.right)]
    }

    fn numbers(&self) -> Vec<u16> {
        let count: u64 = self.tensors().iter().map(|tensor| tensor.sizes.iter().product::<u64>()).sum();
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

    /// The product, by rows.
    fn wanted(&self, numbers: &[u16]) -> Vec<f32> {
        let [left, right] = self.tensors();
        let count = left.sizes.iter().product::<u64>() as usize;
        let (left_numbers, right_numbers) = numbers.split_at(count);
        let number = |tensor: &Tensor, numbers: &[u16], transposed, at: usize, k: usize| {
            let coordinates = if transposed { [at as i64, k as i64] } else { [k as i64 + 16, at as i64] };
            let bits = tensor.element(numbers, &coordinates);
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

    /// The copies that bring a matrix to `to`.
    fn boxes(map: usize, tensor: &Tensor, transposed: bool, to: u32) -> Vec<(usize, &'static str, u32)> {
        let second = (map, "64, 0", to + 2048);
        let first = (map, "0, 0", to);
        if transposed && tensor.sizes[0] == 128 { vec![first, second] } else { vec![first] }
    }

    /// Puts the descriptor of the matrix at `to` into the %rd register of this number.
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

    /// The instruction; `adds` is 0 or 1.
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

    /// Copies the matrices, makes descriptors, loads the left matrix if it is in registers, and sets all sums to 2.
    fn begin(&self) -> String {
        let [left, right] = self.tensors();
        let mut boxes = Self::boxes(2, &right, self.right, 16384);
        if let Some(transposed) = self.left {
            boxes.extend(Self::boxes(1, &left, transposed, 0));
        }
        let bytes = boxes.iter().map(|(map, ..)| if *map == 1 { left.bytes() } else { right.bytes() }).sum();
        let mut text = copies(&boxes, bytes);
        text += &Self::descriptor(20, self.left == Some(true), 0);
        text += &Self::descriptor(21, self.right, 16384);
        // Row 16 · warp + lane / 4 of 32 words each, from word 8 on.
        text += "shr.u32 %r13, %r1, 5; shl.b32 %r13, %r13, 4; and.b32 %r14, %r1, 31; shr.u32 %r14, %r14, 2;
            add.s32 %r13, %r13, %r14; shl.b32 %r13, %r13, 7; and.b32 %r14, %r1, 3; shl.b32 %r14, %r14, 2;
            add.s32 %r13, %r13, %r14; cvt.u64.u32 %rd12, %r13; add.s64 %rd12, %rd12, %rd2;";
        if self.left.is_none() {
            text += "ld.global.u32 %r20, [%rd12+32]; ld.global.u32 %r21, [%rd12+1056];
                ld.global.u32 %r22, [%rd12+48]; ld.global.u32 %r23, [%rd12+1072];";
        }
        text + &(0..self.columns / 2).map(|at| format!("mov.f32 %f{at}, 0f40000000;")).collect::<String>()
    }

    /// Stores the sums behind the first `behind` words.
    fn store_sums(&self, behind: usize) -> String {
        let per_thread = self.columns / 2;
        let mut text = format!("mul.wide.u32 %rd13, %r1, {}; add.s64 %rd13, %rd13, %rd2;", per_thread * 4);
        for at in 0..per_thread {
            text += &format!("st.global.f32 [%rd13+{}], %f{at};", (behind + at) * 4);
        }
        text
    }

    fn words(&self) -> (Vec<u32>, usize) {
        let mut words = packed(&self.numbers());
        let behind = words.len();
        words.resize(behind + 64 * self.columns, 0);
        (words, behind)
    }

    fn maps(&self) -> impl Fn(u64) -> Vec<EncodedMap> {
        let [left, right] = self.tensors();
        move |address| vec![left.map(address), right.map(address + 2 * left.sizes.iter().product::<u64>())]
    }

    /// The sums after this code, by rows.
    fn run(&self, body: &str) -> Vec<f32> {
        let (words, behind) = self.words();
        let out =
            run(128, &words, &self.maps(), &format!("{} {body} {}", self.begin(), self.store_sums(behind))).unwrap();
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
fn wgmma_computes_matrix_products() {
    for format in ["f16", "bf16"] {
        for (columns, left, right) in
            [(64, None, false), (128, None, true), (8, None, false), (64, Some(false), true), (128, Some(true), false)]
        {
            let product = WgmmaCase { format, columns, left, right };
            let wanted = product.wanted(&product.numbers());
            let once = product.run(&format!("{FENCE} {} {WAIT}", product.multiply(0)));
            assert_eq!(once, wanted, "{product:?}");
            // Two products in groups of their own, added to sums of 2; after the first wait, the sums are still pending.
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
fn changes_while_a_product_is_pending_are_errors() {
    let product = WgmmaCase { format: "bf16", columns: 64, left: None, right: false };
    let multiply = product.multiply(1);
    let unread = product.run(&format!("{FENCE} {multiply} mov.b32 %r2, %f0; {WAIT} mov.b32 %f0, %r2;"));
    assert!(unread[0].is_nan() && !unread[1].is_nan());
    for (body, reason) in [
        (format!("{FENCE} {multiply} mov.u32 %r21, 0; {WAIT}"), "the left matrix changed"),
        (format!("{FENCE} {multiply} st.shared.u32 [%r10+16416], %r21; {WAIT}"), "the right matrix changed"),
        (format!("{FENCE} {multiply} mov.f32 %f3, 0f00000000; {WAIT}"), "an accumulator changed"),
        (format!("{FENCE} mov.f32 %f3, 0f00000000; {multiply} {WAIT}"), "register 3 of the sums was written since"),
        (format!("{FENCE} mov.u32 %r21, 0; {multiply} {WAIT}"), "register 1 of the left matrix was written since"),
        (format!("{multiply} {WAIT}"), "was written since"),
        (format!("{FENCE} {multiply} wgmma.commit_group.sync.aligned;"), "ends without waiting for it"),
        (format!("{FENCE} setp.gt.u32 %p3, %r1, 95; @%p3 bra END; {multiply} {WAIT} END:"), "issued 0 to 1 wgmmas"),
        (format!("{FENCE} @!%p1 bra END; {multiply} {WAIT} END:"), "not all lanes"),
        (
            format!("or.b64 %rd21, %rd21, {}; {FENCE} {multiply} {WAIT}", 1u64 << 49),
            "do not begin at a multiple of 1024",
        ),
        (
            format!("and.b64 %rd21, %rd21, {}; {FENCE} {multiply} {WAIT}", (1u64 << 62) - 1),
            "without the 128-byte swizzle",
        ),
        (format!("cvt.u64.u32 %rd9, %r1; add.s64 %rd21, %rd21, %rd9; {FENCE} {multiply} {WAIT}"), "where others have"),
    ] {
        product.fails(&body, reason);
    }
}
