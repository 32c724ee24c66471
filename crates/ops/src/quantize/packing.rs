//! The bytes of blocks of K formats, as ggml lays them out (`block_q2_K` and so on in ggml-common.h).

use super::affine::AffineBlock;
use super::lanes::Codes;
use super::symmetric::SymmetricBlock;
use half::f16;

/// Scales and offsets in 4 bits, values in 2, then the two factors.
#[inline(always)]
pub fn q2_k(block: &AffineBlock, out: &mut [u8]) {
    let AffineBlock { scale, offset, groups, codes } = block;
    groups.iter().zip(&mut out[..16]).for_each(|([scale, offset], out)| *out = scale | offset << 4);
    quarters(codes, &mut out[16..80]);
    put(&mut out[80..], &[*scale, *offset]);
}

/// High bits, low two bits, scales in 6 bits, then the factor.
#[inline(always)]
pub fn q3_k(block: &SymmetricBlock, out: &mut [u8]) {
    let codes = block.codes.map(|codes| codes.map(|code| (code + 4) as u8));
    let (high, rest) = out.split_at_mut(32);
    high.fill(0);
    for (index, code) in codes.as_flattened().iter().enumerate() {
        high[index % 32] |= (code >> 2) << (index / 32);
    }
    quarters(&codes.map(|codes| codes.map(|code| code & 3)), &mut rest[..64]);
    let scales = &mut rest[64..76];
    scales.fill(0);
    for (group, scale) in block.groups.iter().enumerate() {
        let scale = (scale + 32) as u8;
        scales[group % 8] |= (scale & 15) << (4 * (group / 8));
        scales[8 + group % 4] |= (scale >> 4) << (2 * (group / 4));
    }
    put(&mut rest[76..], &[block.scale]);
}

/// The factors, scales and offsets in 6 bits, values in 4.
#[inline(always)]
pub fn q4_k(block: &AffineBlock, out: &mut [u8]) {
    put(out, &[block.scale, block.offset]);
    six_bits(&block.groups, &mut out[4..16]);
    nibbles(&block.codes, &mut out[16..144]);
}

/// As [`q4_k`], with the fifth bits before the values.
#[inline(always)]
pub fn q5_k(block: &AffineBlock, out: &mut [u8]) {
    put(out, &[block.scale, block.offset]);
    six_bits(&block.groups, &mut out[4..16]);
    let high = &mut out[16..48];
    high.fill(0);
    for (index, code) in block.codes.as_flattened().iter().enumerate() {
        high[index % 32] |= (code >> 4) << (index / 32);
    }
    nibbles(&block.codes.map(|codes| codes.map(|code| code & 15)), &mut out[48..176]);
}

/// Low four bits, high two bits, scales, then the factor.
#[inline(always)]
pub fn q6_k(block: &SymmetricBlock, out: &mut [u8]) {
    let codes = block.codes.map(|codes| codes.map(|code| (code + 32) as u8));
    let codes = codes.as_flattened();
    for half in 0..2 {
        for index in 0..32 {
            let [a, b, c, d] = std::array::from_fn(|quarter| codes[128 * half + 32 * quarter + index]);
            out[64 * half + index] = (a & 15) | (c & 15) << 4;
            out[64 * half + 32 + index] = (b & 15) | (d & 15) << 4;
            out[128 + 32 * half + index] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
        }
    }
    block.groups.iter().zip(&mut out[192..208]).for_each(|(scale, out)| *out = *scale as u8);
    put(&mut out[208..], &[block.scale]);
}

/// Four codes of 2 bits in a byte, 32 values apart.
#[inline(always)]
fn quarters(codes: &Codes, out: &mut [u8]) {
    let codes = codes.as_flattened();
    for (index, out) in out.iter_mut().enumerate() {
        let [a, b, c, d] = std::array::from_fn(|quarter| codes[index / 32 * 128 + 32 * quarter + index % 32]);
        *out = a | b << 2 | c << 4 | d << 6;
    }
}

/// Two codes of 4 bits in a byte, 32 values apart.
#[inline(always)]
fn nibbles(codes: &Codes, out: &mut [u8]) {
    let codes = codes.as_flattened();
    for (index, out) in out.iter_mut().enumerate() {
        let first = index / 32 * 64 + index % 32;
        *out = codes[first] | codes[first + 32] << 4;
    }
}

/// Eight scales and eight offsets of 6 bits in 12 bytes.
#[inline(always)]
fn six_bits(groups: &[[u8; 2]; 16], out: &mut [u8]) {
    for group in 0..4 {
        let [[scale, offset], [later_scale, later_offset]] = [groups[group], groups[group + 4]];
        out[group] = scale | (later_scale >> 4) << 6;
        out[group + 4] = offset | (later_offset >> 4) << 6;
        out[group + 8] = (later_scale & 15) | (later_offset & 15) << 4;
    }
}

#[inline(always)]
fn put(out: &mut [u8], factors: &[f16]) {
    out.chunks_exact_mut(2).zip(factors).for_each(|(out, factor)| out.copy_from_slice(&factor.to_le_bytes()));
}
