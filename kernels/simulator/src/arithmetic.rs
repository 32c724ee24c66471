//! What arithmetic instructions compute, by name and number format. f16 and bf16 are computed in a wider format and rounded
//! once. Approximate instructions (`ex2.approx`, `rcp.approx`) give the exact result; `ex2.ftz` flushes subnormal ones.

use crate::convert::{add_toward_zero, multiply_add_down};
use crate::instruction::{AtomicFn, BinaryFn, Lanes, TernaryFn, UnaryFn};
use half::{bf16, f16};
use std::array::from_fn;

/// A number format, stored in the low bits of a lane.
trait Scalar: Copy {
    fn from_lane(bits: u64) -> Self;
    fn to_lane(self) -> u64;
}

macro_rules! impl_scalar {
    ($($type:ty, $from:expr, $to:expr;)*) => { $(impl Scalar for $type {
        fn from_lane(bits: u64) -> Self { $from(bits) }
        fn to_lane(self) -> u64 { $to(self) }
    })* };
}

impl_scalar! {
    u8, |x| x as u8, u64::from;
    u16, |x| x as u16, u64::from;
    i16, |x| x as i16, |x| u64::from(x as u16);
    u32, |x| x as u32, u64::from;
    i32, |x| x as i32, |x| u64::from(x as u32);
    u64, |x| x, |x| x;
    i64, |x| x as i64, |x| x as u64;
    f32, |x| f32::from_bits(x as u32), |x: f32| u64::from(x.to_bits());
    f64, f64::from_bits, f64::to_bits;
    f16, |x| f16::from_bits(x as u16), |x: f16| u64::from(x.to_bits());
    bf16, |x| bf16::from_bits(x as u16), |x: bf16| u64::from(x.to_bits());
    bool, |x| x != 0, u64::from;
}

// Each macro turns a closure over scalars into a function over lanes: a nested function, so that the compiler makes a
// vectorised loop of every one.
macro_rules! unary_fn {
    ($type:ty, $out:ty, $compute:expr) => {{
        fn lanes(a: &Lanes) -> Lanes {
            let compute: fn($type) -> $out = $compute;
            from_fn(|i| compute(<$type>::from_lane(a[i])).to_lane())
        }
        lanes as UnaryFn
    }};
}
macro_rules! binary_fn {
    ($type:ty, $out:ty, $compute:expr) => {{
        fn lanes(a: &Lanes, b: &Lanes) -> Lanes {
            let compute: fn($type, $type) -> $out = $compute;
            from_fn(|i| compute(<$type>::from_lane(a[i]), <$type>::from_lane(b[i])).to_lane())
        }
        lanes as BinaryFn
    }};
}
macro_rules! ternary_fn {
    ($type:ty, $out:ty, $compute:expr) => {{
        fn lanes(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
            let compute: fn($type, $type, $type) -> $out = $compute;
            from_fn(|i| compute(<$type>::from_lane(a[i]), <$type>::from_lane(b[i]), <$type>::from_lane(c[i])).to_lane())
        }
        lanes as TernaryFn
    }};
}

// The same closure for several formats, chosen by name.
macro_rules! for_formats {
    ($format:expr, $macro:ident, $compute:expr, $($name:pat => $type:ty),+) => {
        match $format { $($name => Some($macro!($type, $type, $compute)),)+ _ => None }
    };
}
macro_rules! for_integers {
    ($format:expr, $macro:ident, $compute:expr) => {
        for_formats!($format, $macro, $compute, "u16" => u16, "s16" => i16, "u32" => u32, "s32" => i32, "u64" => u64, "s64" => i64)
    };
}
macro_rules! for_bits {
    ($format:expr, $macro:ident, $compute:expr) => {
        for_formats!($format, $macro, $compute, "pred" => bool, "b16" => u16, "b32" => u32, "b64" => u64)
    };
}
macro_rules! for_floats {
    ($format:expr, $macro:ident, $compute:expr) => {
        for_formats!($format, $macro, $compute, "f32" => f32, "f64" => f64, "f16" => f16, "bf16" => bf16)
    };
}

/// An instruction with one operand: `name` without its modifiers, and the number format.
pub(crate) fn unary(name: &str, modifiers: &[&str], format: &str) -> Option<UnaryFn> {
    match (name, format) {
        ("mov" | "cvta", _) => Some(|a| *a),
        ("not", "pred") => Some(unary_fn!(bool, bool, |a| !a)),
        ("not", _) => for_formats!(format, unary_fn, |a| !a, "b16" => u16, "b32" => u32, "b64" => u64),
        ("neg", "s16" | "s32" | "s64") => {
            for_formats!(format, unary_fn, |a| a.wrapping_neg(), "s16" => i16, "s32" => i32, "s64" => i64)
        }
        ("neg", _) => for_formats!(format, unary_fn, |a| -a, "f32" => f32, "f64" => f64, "f16" => f16, "bf16" => bf16),
        ("abs", "s32" | "s64") => for_formats!(format, unary_fn, |a| a.wrapping_abs(), "s32" => i32, "s64" => i64),
        ("abs", "f32") => Some(unary_fn!(f32, f32, f32::abs)),
        ("abs", "f64") => Some(unary_fn!(f64, f64, f64::abs)),
        ("abs", "f16" | "bf16") => Some(unary_fn!(u16, u16, |a| a & 0x7fff)),
        ("popc", "b32") => Some(unary_fn!(u32, u32, u32::count_ones)),
        ("clz", "b32") => Some(unary_fn!(u32, u32, u32::leading_zeros)),
        ("clz", "b64") => Some(unary_fn!(u64, u32, u64::leading_zeros)),
        ("brev", "b32") => Some(unary_fn!(u32, u32, u32::reverse_bits)),
        ("rcp", _) => for_formats!(format, unary_fn, |a| 1.0 / a, "f32" => f32, "f64" => f64),
        ("sqrt", "f32") => Some(unary_fn!(f32, f32, f32::sqrt)),
        ("sqrt", "f64") => Some(unary_fn!(f64, f64, f64::sqrt)),
        ("rsqrt", "f32") => Some(unary_fn!(f32, f32, |a| (1.0 / f64::from(a).sqrt()) as f32)),
        ("ex2", "f32") if modifiers.contains(&"ftz") => {
            Some(unary_fn!(f32, f32, |a| if a < -126.0 { 0.0 } else { a.exp2() }))
        }
        ("ex2", "f32") => Some(unary_fn!(f32, f32, f32::exp2)),
        ("lg2", "f32") => Some(unary_fn!(f32, f32, f32::log2)),
        ("sin", "f32") => Some(unary_fn!(f32, f32, f32::sin)),
        ("cos", "f32") => Some(unary_fn!(f32, f32, f32::cos)),
        ("tanh", "f32") => Some(unary_fn!(f32, f32, f32::tanh)),
        _ => None,
    }
}

/// An instruction with two operands.
pub(crate) fn binary(name: &str, modifiers: &[&str], format: &str) -> Option<BinaryFn> {
    let integer = !matches!(format, "f16" | "bf16" | "f32" | "f64");
    match name {
        "add" if modifiers.contains(&"rz") => (format == "f32").then(|| binary_fn!(f32, f32, add_toward_zero)),
        "add" if integer => for_integers!(format, binary_fn, |a, b| a.wrapping_add(b)),
        "add" => for_floats!(format, binary_fn, |a, b| a + b),
        "sub" if integer => for_integers!(format, binary_fn, |a, b| a.wrapping_sub(b)),
        "sub" => for_floats!(format, binary_fn, |a, b| a - b),
        "mul" if modifiers.contains(&"wide") => wide_product(format),
        "mul" if modifiers.contains(&"hi") => high_product(format),
        "mul" if integer => for_integers!(format, binary_fn, |a, b| a.wrapping_mul(b)),
        "mul" => for_floats!(format, binary_fn, |a, b| a * b),
        // An integer division by zero gives all ones, as on the device.
        "div" if integer => for_integers!(format, binary_fn, |a, b| if b == 0 { !0 } else { a.wrapping_div(b) }),
        "div" => for_floats!(format, binary_fn, |a, b| a / b),
        "rem" => for_integers!(format, binary_fn, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }),
        "min" | "max" => minimum_or_maximum(name, modifiers.contains(&"NaN"), format),
        "and" => for_bits!(format, binary_fn, |a, b| a & b),
        "or" => for_bits!(format, binary_fn, |a, b| a | b),
        "xor" => for_bits!(format, binary_fn, |a, b| a ^ b),
        "shl" => shift_left(format),
        "shr" => shift_right(format),
        "copysign" => for_formats!(format, binary_fn, |a, b| b.copysign(a), "f32" => f32, "f64" => f64),
        _ => None,
    }
}

/// `mul.wide`: the product in twice the width.
fn wide_product(format: &str) -> Option<BinaryFn> {
    match format {
        "u16" => Some(binary_fn!(u16, u32, |a, b| u32::from(a) * u32::from(b))),
        "s16" => Some(binary_fn!(i16, i32, |a, b| i32::from(a) * i32::from(b))),
        "u32" => Some(binary_fn!(u32, u64, |a, b| u64::from(a) * u64::from(b))),
        "s32" => Some(binary_fn!(i32, i64, |a, b| i64::from(a) * i64::from(b))),
        _ => None,
    }
}

/// `mul.hi`: the upper half of the product.
fn high_product(format: &str) -> Option<BinaryFn> {
    match format {
        "u32" => Some(binary_fn!(u32, u32, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32)),
        "s32" => Some(binary_fn!(i32, i32, |a, b| ((i64::from(a) * i64::from(b)) >> 32) as i32)),
        "u64" => Some(binary_fn!(u64, u64, |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64)),
        "s64" => Some(binary_fn!(i64, i64, |a, b| ((i128::from(a) * i128::from(b)) >> 64) as i64)),
        _ => None,
    }
}

/// `min` and `max`; of a number and NaN they give the number, unless `keeps_nan`.
fn minimum_or_maximum(name: &str, keeps_nan: bool, format: &str) -> Option<BinaryFn> {
    let integer = !matches!(format, "f16" | "bf16" | "f32" | "f64");
    match name {
        "min" if integer => for_integers!(format, binary_fn, |a, b| a.min(b)),
        "max" if integer => for_integers!(format, binary_fn, |a, b| a.max(b)),
        "min" if keeps_nan => for_floats!(format, binary_fn, |a, b| if a < b || a.is_nan() { a } else { b }),
        "max" if keeps_nan => for_floats!(format, binary_fn, |a, b| if a > b || a.is_nan() { a } else { b }),
        "min" => for_floats!(format, binary_fn, |a, b| a.min(b)),
        _ => for_floats!(format, binary_fn, |a, b| a.max(b)),
    }
}

/// `shl`; the amount is always 32 bits wide, and one beyond the width gives 0.
fn shift_left(format: &str) -> Option<BinaryFn> {
    match format {
        "b16" => Some(binary_fn!(u64, u16, |a, b| (a as u16).checked_shl(b as u32).unwrap_or(0))),
        "b32" => Some(binary_fn!(u64, u32, |a, b| (a as u32).checked_shl(b as u32).unwrap_or(0))),
        "b64" => Some(binary_fn!(u64, u64, |a, b| a.checked_shl(b as u32).unwrap_or(0))),
        _ => None,
    }
}

/// `shr`; a signed value fills with its sign.
fn shift_right(format: &str) -> Option<BinaryFn> {
    match format {
        "b16" | "u16" => Some(binary_fn!(u64, u16, |a, b| (a as u16).checked_shr(b as u32).unwrap_or(0))),
        "b32" | "u32" => Some(binary_fn!(u64, u32, |a, b| (a as u32).checked_shr(b as u32).unwrap_or(0))),
        "b64" | "u64" => Some(binary_fn!(u64, u64, |a, b| a.checked_shr(b as u32).unwrap_or(0))),
        "s16" => Some(binary_fn!(u64, i16, |a, b| a as i16 >> (b as u32).min(15))),
        "s32" => Some(binary_fn!(u64, i32, |a, b| a as i32 >> (b as u32).min(31))),
        "s64" => Some(binary_fn!(u64, i64, |a, b| a as i64 >> (b as u32).min(63))),
        _ => None,
    }
}

/// An instruction with three operands.
pub(crate) fn ternary(name: &str, modifiers: &[&str], format: &str) -> Option<TernaryFn> {
    match (name, format) {
        ("mad", "u32") if modifiers.contains(&"wide") => {
            Some(|a, b, c| from_fn(|i| (a[i] as u32 as u64 * (b[i] as u32 as u64)).wrapping_add(c[i])))
        }
        ("mad", "s32") if modifiers.contains(&"wide") => {
            Some(|a, b, c| from_fn(|i| ((i64::from(a[i] as i32) * i64::from(b[i] as i32)) as u64).wrapping_add(c[i])))
        }
        ("mad", _) if modifiers.contains(&"lo") => {
            for_integers!(format, ternary_fn, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        }
        ("fma", "f32") if modifiers.contains(&"rm") => Some(ternary_fn!(f32, f32, multiply_add_down)),
        ("fma" | "mad", "f32") => {
            Some(ternary_fn!(f32, f32, |a, b, c| (f64::from(a) * f64::from(b) + f64::from(c)) as f32))
        }
        ("fma", "f64") => Some(ternary_fn!(f64, f64, f64::mul_add)),
        ("fma", "f16") => Some(ternary_fn!(f16, f16, |a, b, c| f16::from_f64(a.to_f64() * b.to_f64() + c.to_f64()))),
        ("fma", "bf16") => {
            Some(ternary_fn!(bf16, bf16, |a, b, c| bf16::from_f64(a.to_f64() * b.to_f64() + c.to_f64())))
        }
        ("selp", _) => Some(|a, b, c| from_fn(|i| if c[i] != 0 { a[i] } else { b[i] })),
        _ => None,
    }
}

/// A comparison, which gives 0 or 1.
// The longhand forms differ from the short ones for NaN.
#[allow(clippy::double_comparisons, clippy::nonminimal_bool, clippy::neg_cmp_op_on_partial_ord)]
pub(crate) fn compare(relation: &str, format: &str) -> Option<BinaryFn> {
    macro_rules! compared {
        ($compute:expr) => {
            match format {
                "u16" | "b16" => Some(binary_fn!(u16, bool, $compute)),
                "s16" => Some(binary_fn!(i16, bool, $compute)),
                "u32" | "b32" => Some(binary_fn!(u32, bool, $compute)),
                "s32" => Some(binary_fn!(i32, bool, $compute)),
                "u64" | "b64" => Some(binary_fn!(u64, bool, $compute)),
                "s64" => Some(binary_fn!(i64, bool, $compute)),
                "f16" => Some(binary_fn!(f16, bool, $compute)),
                "bf16" => Some(binary_fn!(bf16, bool, $compute)),
                "f32" => Some(binary_fn!(f32, bool, $compute)),
                "f64" => Some(binary_fn!(f64, bool, $compute)),
                _ => None,
            }
        };
    }
    match relation {
        "eq" => compared!(|a, b| a == b),
        // An ordered comparison: false if either is NaN.
        "ne" => compared!(|a, b| a < b || a > b),
        "lt" | "lo" => compared!(|a, b| a < b),
        "le" | "ls" => compared!(|a, b| a <= b),
        "gt" | "hi" => compared!(|a, b| a > b),
        "ge" | "hs" => compared!(|a, b| a >= b),
        "equ" => compared!(|a, b| !(a < b || a > b)),
        "neu" => compared!(|a, b| a != b),
        "ltu" => compared!(|a, b| !(a >= b)),
        "leu" => compared!(|a, b| !(a > b)),
        "gtu" => compared!(|a, b| !(a <= b)),
        "geu" => compared!(|a, b| !(a < b)),
        "num" => compared!(|a, b| a.partial_cmp(&b).is_some()),
        "nan" => compared!(|a, b| a.partial_cmp(&b).is_none()),
        _ => None,
    }
}

/// The update of an atomic instruction.
pub(crate) fn atomic(name: &str, format: &str) -> Option<AtomicFn> {
    Some(match (name, format) {
        ("add", "u32" | "s32") => |old, a, _| u64::from((old as u32).wrapping_add(a as u32)),
        ("add", "u64") => |old, a, _| old.wrapping_add(a),
        ("add", "f32") => |old, a, _| (f32::from_lane(old) + f32::from_lane(a)).to_lane(),
        ("add", "f64") => |old, a, _| (f64::from_lane(old) + f64::from_lane(a)).to_lane(),
        ("add", "f16") => |old, a, _| (f16::from_lane(old) + f16::from_lane(a)).to_lane(),
        ("cas", _) => |old, a, b| if old == a { b } else { old },
        ("exch", _) => |_, a, _| a,
        ("max", "u32") => |old, a, _| old.max(a),
        _ => return None,
    })
}

/// `bfi`: puts the low `length` bits of `a` into `b` at bit `at`.
pub(crate) fn insert_bits(a: u64, b: u64, at: u64, length: u64, width: u64) -> u64 {
    let at = at & 0xff;
    let length = (length & 0xff).min(width);
    if at >= width {
        return b;
    }
    let ones = if length == 64 { u64::MAX } else { (1 << length) - 1 };
    let field = ones << at & if width == 64 { u64::MAX } else { (1 << width) - 1 };
    b & !field | a << at & field
}
