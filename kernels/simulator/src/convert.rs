//! `cvt`: conversion between number formats.

use half::{bf16, f16};

/// A conversion.
#[derive(Clone, Copy, Debug)]
pub struct Convert {
    from: NumberFormat,
    to: NumberFormat,
    rounding: Rounding,
    /// Whether to round to an integer first, even if the result is a float.
    to_integer: bool,
    saturate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum NumberFormat {
    Signed(u32),
    Unsigned(u32),
    F16,
    Bf16,
    F32,
    F64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rounding {
    Nearest,
    Zero,
    Down,
    Up,
}

impl Convert {
    /// Parses the modifiers of `cvt`, of which the last two are the formats.
    pub fn parse(modifiers: &[&str]) -> Option<Self> {
        let [options @ .., to, from] = modifiers else { return None };
        let from = NumberFormat::parse(from)?;
        let to = NumberFormat::parse(to)?;
        let mut convert = Self { from, to, rounding: Rounding::Nearest, to_integer: to.is_integer(), saturate: false };
        for option in options {
            match *option {
                "rn" => {}
                "rz" => convert.rounding = Rounding::Zero,
                "rm" => convert.rounding = Rounding::Down,
                "rp" => convert.rounding = Rounding::Up,
                "rni" | "rzi" | "rmi" | "rpi" => {
                    convert.to_integer = true;
                    convert.rounding = match *option {
                        "rni" => Rounding::Nearest,
                        "rzi" => Rounding::Zero,
                        "rmi" => Rounding::Down,
                        _ => Rounding::Up,
                    };
                }
                "sat" => convert.saturate = true,
                "ftz" => {}
                _ => return None,
            }
        }
        Some(convert)
    }

    /// Converts one value.
    pub fn apply(&self, bits: u64) -> u64 {
        match (self.from.integer_value(bits), self.to.is_integer()) {
            (Some(value), true) if !self.saturate => self.to.truncated(value),
            (Some(value), true) => self.to.clamped(value),
            (Some(value), false) if self.rounding == Rounding::Nearest => self.to.encode_integer(value),
            (Some(value), false) => self.to.rounded(value as f64, self.rounding),
            (None, integer) => {
                let value = self.from.float_value(bits);
                let value = if self.to_integer { self.rounding.round_to_integer(value) } else { value };
                match self.saturate && !integer {
                    true if value.is_nan() => 0,
                    true => self.to.rounded(value.clamp(0.0, 1.0), self.rounding),
                    // NaN becomes 0; other values are clamped to the range.
                    false if integer => self.to.clamped(value as i128),
                    false => self.to.rounded(value, self.rounding),
                }
            }
        }
    }
}

impl NumberFormat {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "f16" => Self::F16,
            "bf16" => Self::Bf16,
            "f32" => Self::F32,
            "f64" => Self::F64,
            _ => match (text.get(..1)?, text[1..].parse().ok()?) {
                ("s", bits) => Self::Signed(bits),
                ("u", bits) => Self::Unsigned(bits),
                _ => return None,
            },
        })
    }

    fn is_integer(self) -> bool {
        matches!(self, Self::Signed(_) | Self::Unsigned(_))
    }

    fn integer_value(self, bits: u64) -> Option<i128> {
        match self {
            Self::Signed(width) => Some(i128::from((bits << (64 - width)).cast_signed() >> (64 - width))),
            Self::Unsigned(width) => Some(i128::from(bits << (64 - width) >> (64 - width))),
            _ => None,
        }
    }

    fn float_value(self, bits: u64) -> f64 {
        match self {
            Self::F16 => f16::from_bits(bits as u16).to_f64(),
            Self::Bf16 => bf16::from_bits(bits as u16).to_f64(),
            Self::F32 => f64::from(f32::from_bits(bits as u32)),
            _ => f64::from_bits(bits),
        }
    }

    fn truncated(self, value: i128) -> u64 {
        match self {
            Self::Signed(width) | Self::Unsigned(width) => (value as u64) << (64 - width) >> (64 - width),
            _ => value as u64,
        }
    }

    fn clamped(self, value: i128) -> u64 {
        let (least, most) = match self {
            Self::Signed(width) => (-(1i128 << (width - 1)), (1i128 << (width - 1)) - 1),
            Self::Unsigned(width) => (0, (1i128 << width) - 1),
            _ => (value, value),
        };
        self.truncated(value.clamp(least, most))
    }

    /// The float nearest to an integer.
    fn encode_integer(self, value: i128) -> u64 {
        match self {
            Self::F32 => u64::from((value as f32).to_bits()),
            _ => self.rounded(value as f64, Rounding::Nearest),
        }
    }

    fn rounded(self, value: f64, rounding: Rounding) -> u64 {
        match self {
            Self::F16 => u64::from(f16::from_f64(value).to_bits()),
            Self::Bf16 => u64::from(bf16::from_f64(value).to_bits()),
            Self::F32 => u64::from(rounding.to_f32(value).to_bits()),
            _ => value.to_bits(),
        }
    }
}

impl Rounding {
    fn round_to_integer(self, value: f64) -> f64 {
        match self {
            Self::Nearest => value.round_ties_even(),
            Self::Zero => value.trunc(),
            Self::Down => value.floor(),
            Self::Up => value.ceil(),
        }
    }

    fn to_f32(self, value: f64) -> f32 {
        let near = value as f32;
        let (down, up) = match self {
            Self::Nearest => (false, false),
            Self::Zero => (value > 0.0, value < 0.0),
            Self::Down => (true, false),
            Self::Up => (false, true),
        };
        match f64::from(near) {
            wide if down && wide > value => near.next_down(),
            wide if up && wide < value => near.next_up(),
            _ => near,
        }
    }
}

/// `a b + c` in f32, rounded down; computed with 53 bits, which hold the product exactly.
pub fn multiply_add_down(a: f32, b: f32, c: f32) -> f32 {
    Rounding::Down.to_f32(f64::from(a) * f64::from(b) + f64::from(c))
}

/// `a + b`, rounded toward zero.
pub fn add_toward_zero(a: f32, b: f32) -> f32 {
    Rounding::Zero.to_f32(f64::from(a) + f64::from(b))
}
