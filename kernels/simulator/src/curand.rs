//! cuRAND's normal generators. The numbers differ from cuRAND's and are the same in every run, whatever the seed.

use crate::driver::{OK, handle, interface, return_value};
use crate::memory::holds;
use std::ffi::{c_int, c_void};

const FAILED: c_int = 201;

/// Calls `write` with the address of each number and a standard normal value (Box-Muller).
fn normal(to: u64, count: usize, bytes: usize, mut write: impl FnMut(u64, f64)) -> c_int {
    if !holds(to, count * bytes) {
        return FAILED;
    }
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    for at in 0..count {
        let radius = (-2.0 * uniform().ln()).sqrt();
        let angle = std::f64::consts::TAU * uniform();
        write(to + (at * bytes) as u64, radius * angle.cos());
    }
    OK
}

interface! {
    fn curandCreateGenerator(generator: *mut *mut c_void, _kind: c_int) {
        // SAFETY: the caller's promise.
        unsafe { return_value(generator, handle()) }
    }
    fn curandDestroyGenerator(_generator: *mut c_void) { OK }
    fn curandSetPseudoRandomGeneratorSeed(_generator: *mut c_void, _seed: u64) { OK }
    fn curandSetStream(_generator: *mut c_void, _stream: *mut c_void) { OK }
    fn curandGenerateNormal(_generator: *mut c_void, to: u64, count: usize, mean: f32, deviation: f32) {
        // SAFETY: `normal` passes only addresses that are allocated.
        normal(to, count, 4, |at, number| unsafe { (at as *mut f32).write(mean + deviation * number as f32) })
    }
    fn curandGenerateNormalDouble(_generator: *mut c_void, to: u64, count: usize, mean: f64, deviation: f64) {
        // SAFETY: `normal` passes only addresses that are allocated.
        normal(to, count, 8, |at, number| unsafe { (at as *mut f64).write(mean + deviation * number) })
    }
    fn curandGenerateUniform(_generator: *mut c_void, _to: u64, _count: usize) { FAILED }
    fn curandGenerateUniformDouble(_generator: *mut c_void, _to: u64, _count: usize) { FAILED }
}
