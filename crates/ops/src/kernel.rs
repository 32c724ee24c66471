//! [`CpuKernel`]: arithmetic on contiguous inputs as a differentiable candle operation.

use crate::simd::Element;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

/// Elements per task. Fixed, so that sums do not depend on the number of threads; 16384 f32 are 64 KiB, enough work to
/// outweigh the cost of a task.
pub(crate) const GRAIN: usize = 1 << 14;

/// Arithmetic on contiguous inputs of one dtype, on the CPU.
pub(crate) trait CpuKernel: Send + Sync + 'static {
    /// The operation's name in error messages.
    const NAME: &'static str;

    /// The output, row-major.
    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>>;

    /// Shape of the output; by default that of the first input.
    fn shape(&self, first: &Shape) -> Shape {
        first.clone()
    }

    /// Gradients of the tracked arguments, none for the others.
    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let _ = (args, grad);
        bail!("{} has no second derivative", Self::NAME)
    }
}

/// Whether there is a kernel for the device and dtype of `x`; otherwise the reference runs.
pub(crate) fn supported(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64 | DType::BF16)
}

/// Runs a kernel on one to three tensors of one dtype; differentiable.
pub(crate) fn apply<K: CpuKernel>(kernel: K, args: &[&Tensor]) -> Result<Tensor> {
    match args {
        [a] => a.contiguous()?.apply_op1(FusedOp(kernel)),
        [a, b] => a.contiguous()?.apply_op2(&b.contiguous()?, FusedOp(kernel)),
        [a, b, c] => a.contiguous()?.apply_op3(&b.contiguous()?, &c.contiguous()?, FusedOp(kernel)),
        _ => bail!("{}: expected one to three tensors, found {}", K::NAME, args.len()),
    }
}

/// Computes a gradient if `arg` is tracked; frozen arguments cost nothing.
pub(crate) fn gradient<K: CpuKernel>(arg: &Tensor, kernel: K, inputs: &[&Tensor]) -> Result<Option<Tensor>> {
    if !arg.track_op() {
        return Ok(None);
    }
    let inputs: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
    apply(kernel, &inputs.iter().collect::<Vec<_>>()).map(Some)
}

struct FusedOp<K>(K);

impl<K: CpuKernel> FusedOp<K> {
    fn run(&self, inputs: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        let shape = self.0.shape(inputs[0].1.shape());
        let storage = match inputs[0].0 {
            CpuStorage::F32(_) => self.run_as::<f32>(inputs)?,
            CpuStorage::F64(_) => self.run_as::<f64>(inputs)?,
            CpuStorage::BF16(_) => self.run_as::<half::bf16>(inputs)?,
            _ => bail!("{} has no kernel for {:?}", K::NAME, inputs[0].0.dtype()),
        };
        Ok((storage, shape))
    }

    fn run_as<E: Element>(&self, inputs: &[(&CpuStorage, &Layout)]) -> Result<CpuStorage> {
        let slices =
            inputs.iter().map(|(storage, layout)| contiguous::<E>(storage, layout)).collect::<Result<Vec<_>>>()?;
        Ok(E::to_cpu_storage_owned(self.0.forward(&slices)?))
    }
}

/// The elements of a contiguous tensor.
pub(crate) fn contiguous<'a, E: Element>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [E]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&E::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("expected a contiguous tensor, found {layout:?}"),
    }
}

impl<K: CpuKernel> CustomOp1 for FusedOp<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(&[(a, la)])
    }

    fn bwd(&self, a: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.0.backward(&[a], grad)?.swap_remove(0))
    }
}

impl<K: CpuKernel> CustomOp2 for FusedOp<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(&[(a, la), (b, lb)])
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.0.backward(&[a, b], grad)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten()))
    }
}

type OpGradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl<K: CpuKernel> CustomOp3 for FusedOp<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(&[(a, la), (b, lb), (c, lc)])
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, c: &Tensor, _: &Tensor, grad: &Tensor) -> Result<OpGradients> {
        let mut gradients = self.0.backward(&[a, b, c], grad)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten(), gradients.next().flatten()))
    }
}

/// Calls `fill` in parallel with the index of a row and a block of whole rows of `out` that begins there.
pub(crate) fn for_rows<E: Element>(out: &mut [E], width: usize, fill: impl Fn(usize, &mut [E]) + Sync) {
    use rayon::prelude::*;
    let rows = (GRAIN / width.max(1)).max(1);
    out.par_chunks_mut((rows * width).max(1)).enumerate().for_each(|(chunk, out)| fill(chunk * rows, out));
}

/// Sums each of `groups` groups of `rows` rows, where `add` adds a range of rows to the sums. Partial sums cover fixed
/// ranges and are added in order, so that the result does not depend on the number of threads.
///
/// # Shapes
/// -> (groups, width).
pub(crate) fn column_sums<E: Element>(
    groups: usize,
    rows: usize,
    width: usize,
    add: impl Fn(std::ops::Range<usize>, &mut [E::Work]) + Sync,
) -> Vec<E> {
    use crate::simd::Real;
    use rayon::prelude::*;
    let step = (GRAIN / width.max(1)).max(1);
    let partial = |range: std::ops::Range<usize>| {
        let mut sums = vec![E::Work::ZERO; width];
        add(range, &mut sums);
        sums
    };
    let group = |group: usize| {
        let starts: Vec<usize> = (0..rows).step_by(step).collect();
        let range = |start: &usize| group * rows + start..group * rows + rows.min(start + step);
        let partials: Vec<Vec<E::Work>> = starts.par_iter().map(|start| partial(range(start))).collect();
        let mut sums = vec![E::Work::ZERO; width];
        for partial in partials {
            sums.iter_mut().zip(partial).for_each(|(sum, part)| *sum += part);
        }
        sums.into_iter().map(E::store).collect::<Vec<E>>()
    };
    (0..groups).into_par_iter().flat_map_iter(group).collect()
}
