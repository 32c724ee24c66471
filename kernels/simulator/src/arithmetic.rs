//! What instructions compute, by name and number format. f16 and bf16 are computed in wider formats and rounded once;
//! approximations (`ex2.approx`, `rcp.approx`) are the exact results, and only `ex2` flushes what is below the least normal.

use crate::convert::{add_to_zero, multiply_add_down};
use crate::instruction::Lanes;
use half::{bf16, f16};
use std::array::from_fn;

pub(crate) type One = fn(&Lanes) -> Lanes;
pub(crate) type Two = fn(&Lanes, &Lanes) -> Lanes;
pub(crate) type Three = fn(&Lanes, &Lanes, &Lanes) -> Lanes;

/// A number format as the low bits of a lane.
trait Number: Copy {
    fn of(bits: u64) -> Self;
    fn bits(self) -> u64;
}

macro_rules! numbers {
    ($($type:ty, $of:expr, $bits:expr;)*) => { $(impl Number for $type {
        fn of(bits: u64) -> Self { $of(bits) }
        fn bits(self) -> u64 { $bits(self) }
    })* };
}

numbers! {
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

// A closure of numbers as a function of lanes. Nested functions, so that each is compiled into a loop of its own.
macro_rules! one {
    ($type:ty, $out:ty, $compute:expr) => {{
        fn all(a: &Lanes) -> Lanes {
            let compute: fn($type) -> $out = $compute;
            from_fn(|i| compute(<$type>::of(a[i])).bits())
        }
        all as One
    }};
}
macro_rules! two {
    ($type:ty, $out:ty, $compute:expr) => {{
        fn all(a: &Lanes, b: &Lanes) -> Lanes {
            let compute: fn($type, $type) -> $out = $compute;
            from_fn(|i| compute(<$type>::of(a[i]), <$type>::of(b[i])).bits())
        }
        all as Two
    }};
}
macro_rules! three {
    ($type:ty, $out:ty, $compute:expr) => {{
        fn all(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
            let compute: fn($type, $type, $type) -> $out = $compute;
            from_fn(|i| compute(<$type>::of(a[i]), <$type>::of(b[i]), <$type>::of(c[i])).bits())
        }
        all as Three
    }};
}
// The same for a set of formats.
macro_rules! of_type {
    ($name:expr, $macro:ident, $compute:expr, $($text:pat => $type:ty),+) => {
        match $name { $($text => Some($macro!($type, $type, $compute)),)+ _ => None }
    };
}
macro_rules! integers {
    ($name:expr, $macro:ident, $compute:expr) => {
        of_type!($name, $macro, $compute, "u16" => u16, "s16" => i16, "u32" => u32, "s32" => i32, "u64" => u64, "s64" => i64)
    };
}
macro_rules! bits {
    ($name:expr, $macro:ident, $compute:expr) => {
        of_type!($name, $macro, $compute, "pred" => bool, "b16" => u16, "b32" => u32, "b64" => u64)
    };
}

macro_rules! reals {
    ($name:expr, $macro:ident, $compute:expr) => {
        of_type!($name, $macro, $compute, "f32" => f32, "f64" => f64, "f16" => f16, "bf16" => bf16)
    };
}

/// An operation with one operand, by its name without formats and modifiers, and its format.
pub(crate) fn one(name: &str, modifiers: &[&str], format: &str) -> Option<One> {
    match (name, format) {
        ("mov" | "cvta", _) => Some(|a| *a),
        ("not", "pred") => Some(one!(bool, bool, |a| !a)),
        ("not", _) => of_type!(format, one, |a| !a, "b16" => u16, "b32" => u32, "b64" => u64),
        ("neg", "s16" | "s32" | "s64") => {
            of_type!(format, one, |a| a.wrapping_neg(), "s16" => i16, "s32" => i32, "s64" => i64)
        }
        ("neg", _) => of_type!(format, one, |a| -a, "f32" => f32, "f64" => f64, "f16" => f16, "bf16" => bf16),
        ("abs", "s32" | "s64") => of_type!(format, one, |a| a.wrapping_abs(), "s32" => i32, "s64" => i64),
        ("abs", "f32") => Some(one!(f32, f32, f32::abs)),
        ("abs", "f64") => Some(one!(f64, f64, f64::abs)),
        ("abs", "f16" | "bf16") => Some(one!(u16, u16, |a| a & 0x7fff)),
        ("popc", "b32") => Some(one!(u32, u32, u32::count_ones)),
        ("clz", "b32") => Some(one!(u32, u32, u32::leading_zeros)),
        ("clz", "b64") => Some(one!(u64, u32, u64::leading_zeros)),
        ("brev", "b32") => Some(one!(u32, u32, u32::reverse_bits)),
        ("rcp", _) => of_type!(format, one, |a| 1.0 / a, "f32" => f32, "f64" => f64),
        ("sqrt", "f32") => Some(one!(f32, f32, f32::sqrt)),
        ("sqrt", "f64") => Some(one!(f64, f64, f64::sqrt)),
        ("rsqrt", "f32") => Some(one!(f32, f32, |a| (1.0 / f64::from(a).sqrt()) as f32)),
        ("ex2", "f32") if modifiers.contains(&"ftz") => {
            Some(one!(f32, f32, |a| if a < -126.0 { 0.0 } else { a.exp2() }))
        }
        ("ex2", "f32") => Some(one!(f32, f32, f32::exp2)),
        ("lg2", "f32") => Some(one!(f32, f32, f32::log2)),
        ("sin", "f32") => Some(one!(f32, f32, f32::sin)),
        ("cos", "f32") => Some(one!(f32, f32, f32::cos)),
        ("tanh", "f32") => Some(one!(f32, f32, f32::tanh)),
        _ => None,
    }
}

/// With two.
pub(crate) fn two(name: &str, modifiers: &[&str], format: &str) -> Option<Two> {
    let whole = !matches!(format, "f16" | "bf16" | "f32" | "f64");
    match name {
        "add" if modifiers.contains(&"rz") => (format == "f32").then(|| two!(f32, f32, add_to_zero)),
        "add" if whole => integers!(format, two, |a, b| a.wrapping_add(b)),
        "add" => reals!(format, two, |a, b| a + b),
        "sub" if whole => integers!(format, two, |a, b| a.wrapping_sub(b)),
        "sub" => reals!(format, two, |a, b| a - b),
        "mul" if modifiers.contains(&"wide") => match format {
            "u16" => Some(two!(u16, u32, |a, b| u32::from(a) * u32::from(b))),
            "s16" => Some(two!(i16, i32, |a, b| i32::from(a) * i32::from(b))),
            "u32" => Some(two!(u32, u64, |a, b| u64::from(a) * u64::from(b))),
            "s32" => Some(two!(i32, i64, |a, b| i64::from(a) * i64::from(b))),
            _ => None,
        },
        "mul" if modifiers.contains(&"hi") => match format {
            "u32" => Some(two!(u32, u32, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32)),
            "s32" => Some(two!(i32, i32, |a, b| ((i64::from(a) * i64::from(b)) >> 32) as i32)),
            "u64" => Some(two!(u64, u64, |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64)),
            "s64" => Some(two!(i64, i64, |a, b| ((i128::from(a) * i128::from(b)) >> 64) as i64)),
            _ => None,
        },
        "mul" if whole => integers!(format, two, |a, b| a.wrapping_mul(b)),
        "mul" => reals!(format, two, |a, b| a * b),
        // A division by zero gives all ones, as on the device.
        "div" if whole => integers!(format, two, |a, b| if b == 0 { !0 } else { a.wrapping_div(b) }),
        "div" => reals!(format, two, |a, b| a / b),
        "rem" => integers!(format, two, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }),
        "min" if whole => integers!(format, two, |a, b| a.min(b)),
        "max" if whole => integers!(format, two, |a, b| a.max(b)),
        "min" if modifiers.contains(&"NaN") => reals!(format, two, |a, b| if a < b || a.is_nan() { a } else { b }),
        "max" if modifiers.contains(&"NaN") => reals!(format, two, |a, b| if a > b || a.is_nan() { a } else { b }),
        "min" => reals!(format, two, |a, b| a.min(b)),
        "max" => reals!(format, two, |a, b| a.max(b)),
        "and" => bits!(format, two, |a, b| a & b),
        "or" => bits!(format, two, |a, b| a | b),
        "xor" => bits!(format, two, |a, b| a ^ b),
        "shl" => match format {
            "b16" => Some(two!(u64, u16, |a, b| (a as u16).checked_shl(b as u32).unwrap_or(0))),
            "b32" => Some(two!(u64, u32, |a, b| (a as u32).checked_shl(b as u32).unwrap_or(0))),
            "b64" => Some(two!(u64, u64, |a, b| a.checked_shl(b as u32).unwrap_or(0))),
            _ => None,
        },
        "shr" => match format {
            "b16" | "u16" => Some(two!(u64, u16, |a, b| (a as u16).checked_shr(b as u32).unwrap_or(0))),
            "b32" | "u32" => Some(two!(u64, u32, |a, b| (a as u32).checked_shr(b as u32).unwrap_or(0))),
            "b64" | "u64" => Some(two!(u64, u64, |a, b| a.checked_shr(b as u32).unwrap_or(0))),
            "s16" => Some(two!(u64, i16, |a, b| a as i16 >> (b as u32).min(15))),
            "s32" => Some(two!(u64, i32, |a, b| a as i32 >> (b as u32).min(31))),
            "s64" => Some(two!(u64, i64, |a, b| a as i64 >> (b as u32).min(63))),
            _ => None,
        },
        "copysign" => of_type!(format, two, |a, b| b.copysign(a), "f32" => f32, "f64" => f64),
        _ => None,
    }
}

/// With three.
pub(crate) fn three(name: &str, modifiers: &[&str], format: &str) -> Option<Three> {
    match (name, format) {
        ("mad", "u32") if modifiers.contains(&"wide") => {
            Some(|a, b, c| from_fn(|i| (a[i] as u32 as u64 * (b[i] as u32 as u64)).wrapping_add(c[i])))
        }
        ("mad", "s32") if modifiers.contains(&"wide") => {
            Some(|a, b, c| from_fn(|i| ((i64::from(a[i] as i32) * i64::from(b[i] as i32)) as u64).wrapping_add(c[i])))
        }
        ("mad", _) if modifiers.contains(&"lo") => {
            integers!(format, three, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        }
        ("fma", "f32") if modifiers.contains(&"rm") => Some(three!(f32, f32, multiply_add_down)),
        ("fma" | "mad", "f32") => Some(three!(f32, f32, |a, b, c| (f64::from(a) * f64::from(b) + f64::from(c)) as f32)),
        ("fma", "f64") => Some(three!(f64, f64, f64::mul_add)),
        ("fma", "f16") => Some(three!(f16, f16, |a, b, c| f16::from_f64(a.to_f64() * b.to_f64() + c.to_f64()))),
        ("fma", "bf16") => Some(three!(bf16, bf16, |a, b, c| bf16::from_f64(a.to_f64() * b.to_f64() + c.to_f64()))),
        ("selp", _) => Some(|a, b, c| from_fn(|i| if c[i] != 0 { a[i] } else { b[i] })),
        _ => None,
    }
}

/// Whether a comparison holds, 0 or 1.
// Numbers that cannot be compared make the long forms differ from the short ones.
#[allow(clippy::double_comparisons, clippy::nonminimal_bool, clippy::neg_cmp_op_on_partial_ord)]
pub(crate) fn compare(relation: &str, format: &str) -> Option<Two> {
    macro_rules! compared {
        ($compute:expr) => {
            match format {
                "u16" | "b16" => Some(two!(u16, bool, $compute)),
                "s16" => Some(two!(i16, bool, $compute)),
                "u32" | "b32" => Some(two!(u32, bool, $compute)),
                "s32" => Some(two!(i32, bool, $compute)),
                "u64" | "b64" => Some(two!(u64, bool, $compute)),
                "s64" => Some(two!(i64, bool, $compute)),
                "f16" => Some(two!(f16, bool, $compute)),
                "bf16" => Some(two!(bf16, bool, $compute)),
                "f32" => Some(two!(f32, bool, $compute)),
                "f64" => Some(two!(f64, bool, $compute)),
                _ => None,
            }
        };
    }
    match relation {
        "eq" => compared!(|a, b| a == b),
        // Ordered: false where one is no number.
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

/// What an atomic operation leaves: of the old value and one operand, or two.
pub(crate) fn atomic(name: &str, format: &str) -> Option<fn(u64, u64, u64) -> u64> {
    Some(match (name, format) {
        ("add", "u32" | "s32") => |old, a, _| u64::from((old as u32).wrapping_add(a as u32)),
        ("add", "u64") => |old, a, _| old.wrapping_add(a),
        ("add", "f32") => |old, a, _| (f32::of(old) + f32::of(a)).bits(),
        ("add", "f64") => |old, a, _| (f64::of(old) + f64::of(a)).bits(),
        ("add", "f16") => |old, a, _| (f16::of(old) + f16::of(a)).bits(),
        ("cas", _) => |old, a, b| if old == a { b } else { old },
        ("exch", _) => |_, a, _| a,
        ("max", "u32") => |old, a, _| old.max(a),
        _ => return None,
    })
}

/// `bfi.b32`: the low `length` bits of a, put into b at `at`. Four operands make it a case of its own.
pub(crate) fn insert_bits(a: u64, b: u64, at: u64, length: u64, width: u64) -> u64 {
    let (at, length) = (at & 0xff, (length & 0xff).min(width));
    if at >= width {
        return b;
    }
    let ones = if length == 64 { u64::MAX } else { (1 << length) - 1 };
    let field = ones << at & if width == 64 { u64::MAX } else { (1 << width) - 1 };
    b & !field | a << at & field
}
