//! [`Fp8`]: the 8-bit floating-point dtypes. Files store weights in them; they are converted to bf16 before anything is
//! computed.

use safetensors::Dtype;

/// An fp8 dtype. The highest bit is the sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fp8 {
    /// 4 bits of exponent, 3 of mantissa, no infinities: `torch.float8_e4m3fn`.
    E4M3,
    /// 5 bits of exponent, 2 of mantissa, the upper byte of an f16: `torch.float8_e5m2`.
    E5M2,
}

impl Fp8 {
    /// `dtype` as one of these, if it is one.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F8_E4M3 => Some(Self::E4M3),
            Dtype::F8_E5M2 => Some(Self::E5M2),
            _ => None,
        }
    }

    /// The value of `byte`.
    pub fn value(self, byte: u8) -> f32 {
        let (bits, bias) = match self {
            Self::E4M3 => (3, 7),
            Self::E5M2 => (2, 15),
        };
        let exponent = i32::from(byte & 0x7f) >> bits;
        let mantissa = f32::from(byte & ((1 << bits) - 1));
        let magnitude = match (self, byte & 0x7f) {
            (Self::E4M3, 0x7f) | (Self::E5M2, 0x7d..) => f32::NAN,
            (Self::E5M2, 0x7c) => f32::INFINITY,
            _ if exponent == 0 => mantissa * power_of_two(1 - bias - bits),
            _ => (mantissa + f32::from(1u8 << bits)) * power_of_two(exponent - bias - bits),
        };
        if byte & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// `bytes` times `scale` as little-endian bf16: the exact product, rounded once, to nearest with ties to even. A
    /// scale of 1 needs no rounding.
    pub fn to_bf16(self, bytes: &[u8], scale: f32) -> Vec<u8> {
        let product = |byte| round_to_bf16(f64::from(self.value(byte)) * f64::from(scale)).to_le_bytes();
        let table: Vec<[u8; 2]> = (0..=u8::MAX).map(product).collect();
        bytes.iter().flat_map(|byte| table[usize::from(*byte)]).collect()
    }
}

fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// Rounds once from f64 to bf16. Rounding to f32 first could land on a tie that the exact value is not; setting the
/// last bit of an inexact f32 ("round to odd") keeps it off the tie.
fn round_to_bf16(number: f64) -> u16 {
    let nearest = number as f32;
    if nearest.is_nan() {
        return (nearest.to_bits() >> 16) as u16 | 0x40;
    }
    let is_exact = f64::from(nearest) == number;
    let rounded_up = f64::from(nearest).abs() > number.abs();
    let bits = if is_exact { nearest.to_bits() } else { (nearest.to_bits() - u32::from(rounded_up)) | 1 };
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};

    /// Checked against candle: E4M3 directly, E5M2 as the upper byte of an f16.
    #[test]
    fn every_byte_has_the_value_that_candle_gives_it() {
        let all: Vec<u8> = (0..=255).collect();
        let halves: Vec<u8> = all.iter().flat_map(|byte| [0, *byte]).collect();
        for (format, dtype, bytes) in [(Fp8::E4M3, DType::F8E4M3, &all), (Fp8::E5M2, DType::F16, &halves)] {
            let known = Tensor::from_raw_buffer(bytes, dtype, &[256], &Device::Cpu).unwrap();
            let known: Vec<f32> = known.to_dtype(DType::F32).unwrap().to_vec1().unwrap();
            for (byte, known) in all.iter().zip(known) {
                let value = format.value(*byte);
                assert!(value.to_bits() == known.to_bits() || value.is_nan() && known.is_nan(), "{format:?} {byte}");
            }
        }
        assert_eq!((Fp8::E4M3.value(0x7e), Fp8::E4M3.value(0x81)), (448.0, -0.001_953_125));
        assert_eq!((Fp8::E5M2.value(0x7b), Fp8::E5M2.value(0xfc)), (57344.0, f32::NEG_INFINITY));
    }

    /// The result is the bf16 nearest to the exact product, the even one of two equally near.
    #[test]
    fn a_product_is_rounded_once() {
        let value = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
        // With the third scale, 17 products are ties except for a bit that an f32 loses.
        for scale in [1.0f32, 0.003_173_828, 1.003_906_4, -7.5, 1e-38, 3e38, f32::from_bits(0x3f80_8001)] {
            for format in [Fp8::E4M3, Fp8::E5M2] {
                for byte in (0..=255u8).filter(|byte| format.value(*byte).is_finite()) {
                    let exact = f64::from(format.value(byte)) * f64::from(scale);
                    let bytes = format.to_bf16(&[byte], scale);
                    let got = u16::from_le_bytes([bytes[0], bytes[1]]);
                    if !value(got).is_finite() {
                        assert!(exact.abs() >= value(0x7f7f) + (value(0x7f7f) - value(0x7f7e)) / 2.0);
                        assert_eq!(value(got).is_sign_negative(), exact < 0.0);
                        continue;
                    }
                    let distance = |bits: u16| (value(bits) - exact).abs();
                    for other in
                        [got.wrapping_sub(1), got.wrapping_add(1)].into_iter().filter(|bits| bits & 0x7fff < 0x7f80)
                    {
                        let worse = distance(other) > distance(got) || distance(other) == distance(got) && got % 2 == 0;
                        assert!(worse, "{format:?} {byte} times {scale}: {got:#x}, not {other:#x}");
                    }
                }
            }
        }
        assert!(value(u16::from_le_bytes(Fp8::E4M3.to_bf16(&[0xff], 2.0).try_into().unwrap())).is_nan());
    }
}
