//! Matrix products of cuBLAS: column-major, with sums in f32 (in f64 for f64).

use crate::driver::{handle, interface, return_value};
use crate::memory::holds;
use crate::report::{count, problem};
use half::{bf16, f16};
use std::ffi::{c_int, c_void};

const OK: c_int = 0;
const INVALID_VALUE: c_int = 7;

/// `CUDA_R_64F`
const DATA_F64: c_int = 1;
/// `CUBLAS_COMPUTE_64F`
const COMPUTE_F64: c_int = 70;
/// `CUBLAS_GEMM_DFALT`
const DEFAULT_ALGORITHM: c_int = -1;

/// `cudaDataType_t`
#[derive(Clone, Copy, PartialEq)]
enum DataType {
    F16,
    Bf16,
    F32,
    F64,
}

impl DataType {
    fn from_c(value: c_int) -> Option<Self> {
        Some(match value {
            0 => Self::F32,
            DATA_F64 => Self::F64,
            2 => Self::F16,
            14 => Self::Bf16,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// A matrix in device memory; element (i, j) is `i + j * leading` elements from the start.
#[derive(Clone, Copy)]
struct Matrix {
    address: u64,
    data_type: DataType,
    transposed: bool,
    leading: usize,
}

impl Matrix {
    /// Whether a matrix of this size is allocated.
    fn is_allocated(&self, rows: usize, columns: usize) -> bool {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        rows == 0 || columns == 0 || holds(self.address, ((columns - 1) * self.leading + rows) * self.data_type.bytes())
    }

    fn element_address(&self, row: usize, column: usize) -> u64 {
        let (row, column) = if self.transposed { (column, row) } else { (row, column) };
        self.address + ((row + column * self.leading) * self.data_type.bytes()) as u64
    }

    /// # Safety
    /// The element must be allocated.
    unsafe fn read(&self, row: usize, column: usize) -> f64 {
        let at = self.element_address(row, column);
        // SAFETY: the caller's promise.
        unsafe {
            match self.data_type {
                DataType::F16 => (at as *const f16).read_unaligned().to_f64(),
                DataType::Bf16 => (at as *const bf16).read_unaligned().to_f64(),
                DataType::F32 => f64::from((at as *const f32).read_unaligned()),
                DataType::F64 => (at as *const f64).read_unaligned(),
            }
        }
    }

    /// # Safety
    /// The element must be allocated and not in use by another thread.
    unsafe fn write(&self, row: usize, column: usize, value: f64) {
        let at = self.element_address(row, column);
        // SAFETY: the caller's promise.
        unsafe {
            match self.data_type {
                DataType::F16 => (at as *mut f16).write_unaligned(f16::from_f64(value)),
                DataType::Bf16 => (at as *mut bf16).write_unaligned(bf16::from_f64(value)),
                DataType::F32 => (at as *mut f32).write_unaligned(value as f32),
                DataType::F64 => (at as *mut f64).write_unaligned(value),
            }
        }
    }
}

/// `c = alpha · a · b + beta · c`, with `a` of m x k and `b` of k x n.
struct Gemm {
    a: Matrix,
    b: Matrix,
    c: Matrix,
    m: usize,
    n: usize,
    k: usize,
    alpha: f64,
    beta: f64,
}

impl Gemm {
    fn run(&self) -> c_int {
        let Self { a, b, c, m, n, k, .. } = *self;
        if !a.is_allocated(m, k) || !b.is_allocated(k, n) || !c.is_allocated(m, n) {
            problem(&format!("a product of {m} x {k} and {k} x {n} is not in allocated memory"));
            return INVALID_VALUE;
        }
        // SAFETY: allocated, as just checked.
        let rows: Vec<f64> = (0..m * k).map(|at| unsafe { a.read(at / k.max(1), at % k.max(1)) }).collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(n.max(1));
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let rows = &rows;
                scope.spawn(move || {
                    for column in n * thread / threads..n * (thread + 1) / threads {
                        self.compute_column(rows, column);
                    }
                });
            }
        });
        OK
    }

    /// Computes a column of the result from all rows of `a`.
    fn compute_column(&self, rows: &[f64], column: usize) {
        let Self { b, c, m, k, alpha, beta, .. } = *self;
        // SAFETY: `run` checked that all three matrices are allocated, and gives each column to one thread.
        unsafe {
            let right: Vec<f64> = (0..k).map(|at| b.read(at, column)).collect();
            for row in 0..m {
                let left = &rows[row * k..][..k];
                let sum = if c.data_type == DataType::F64 {
                    left.iter().zip(&right).map(|(left, right)| left * right).sum()
                } else {
                    dot_f32(left, &right)
                };
                // `c` may be uninitialised if beta is 0.
                let before = if beta == 0.0 { 0.0 } else { beta * c.read(row, column) };
                c.write(row, column, alpha * sum + before);
            }
        }
    }
}

/// A dot product with sixteen f32 sums.
fn dot_f32(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += (a * b) as f32;
        }
    }
    f64::from(sums.iter().sum::<f32>())
}

/// Reads alpha or beta, whose format follows from the compute type.
///
/// # Safety
/// `from` points to a number of that format.
unsafe fn read_scalar(from: *const c_void, compute: c_int) -> f64 {
    // SAFETY: the caller's promise.
    unsafe {
        match compute {
            64 | 65 => from.cast::<f16>().read().to_f64(),
            COMPUTE_F64 | 71 => from.cast::<f64>().read(),
            _ => f64::from(from.cast::<f32>().read()),
        }
    }
}

/// A matrix for each entry of a batch.
struct BatchedMatrix {
    first: Matrix,
    /// Elements from one entry's matrix to the next.
    stride: i64,
}

impl BatchedMatrix {
    fn new(address: u64, data_type: c_int, transposed: c_int, leading: c_int, stride: i64) -> Option<Self> {
        let data_type = DataType::from_c(data_type)?;
        let first = Matrix { address, data_type, transposed: transposed != 0, leading: leading as usize };
        Some(Self { first, stride })
    }

    fn entry(&self, number: i64) -> Matrix {
        let offset = number * self.stride * self.first.data_type.bytes() as i64;
        Matrix { address: self.first.address.wrapping_add_signed(offset), ..self.first }
    }
}

interface! {
    fn cublasGemmStridedBatchedEx(
        _handle: *mut c_void, transpose_a: c_int, transpose_b: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void,
        a: u64, a_type: c_int, a_leading: c_int, a_stride: i64, b: u64, b_type: c_int, b_leading: c_int, b_stride: i64,
        beta: *const c_void, c: u64, c_type: c_int, c_leading: c_int, c_stride: i64, batch: c_int, compute: c_int,
        _algorithm: c_int
    ) {
        count("cublasGemmStridedBatchedEx", batch as usize);
        let a = BatchedMatrix::new(a, a_type, transpose_a, a_leading, a_stride);
        let b = BatchedMatrix::new(b, b_type, transpose_b, b_leading, b_stride);
        let c = BatchedMatrix::new(c, c_type, 0, c_leading, c_stride);
        let (Some(a), Some(b), Some(c)) = (a, b, c) else { return INVALID_VALUE };
        let [m, n, k] = [m, n, k].map(|size| size as usize);
        // SAFETY: the caller's promise.
        let [alpha, beta] = [alpha, beta].map(|from| unsafe { read_scalar(from, compute) });
        let entries = 0..i64::from(batch);
        let mut products = entries.map(|at| Gemm { a: a.entry(at), b: b.entry(at), c: c.entry(at), m, n, k, alpha, beta });
        products.find_map(|product| Some(product.run()).filter(|status| *status != OK)).unwrap_or(OK)
    }
    fn cublasDgemmStridedBatched(
        handle: *mut c_void, transpose_a: c_int, transpose_b: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void,
        a: u64, a_leading: c_int, a_stride: i64, b: u64, b_leading: c_int, b_stride: i64, beta: *const c_void, c: u64,
        c_leading: c_int, c_stride: i64, batch: c_int
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            cublasGemmStridedBatchedEx(
                handle, transpose_a, transpose_b, m, n, k, alpha, a, DATA_F64, a_leading, a_stride, b, DATA_F64, b_leading,
                b_stride, beta, c, DATA_F64, c_leading, c_stride, batch, COMPUTE_F64, DEFAULT_ALGORITHM,
            )
        }
    }
    fn cublasCreate_v2(to: *mut *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { return_value(to, handle()) }
    }
    fn cublasDestroy_v2(_handle: *mut c_void) { OK }
    fn cublasSetStream_v2(_handle: *mut c_void, _stream: *mut c_void) { OK }
}
