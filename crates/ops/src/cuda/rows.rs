//! The row-wise operations on a GPU, each with the gradient of x. Their other arguments are constants: where one is
//! tracked, or no kernel supports the problem, they return none, and the caller falls back to the reference.

use super::{address, address_of, scalar, start};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, bail,
};
use clearform_kernels::add_bias::{self, AddBiasParameters};
use clearform_kernels::gated_add::{self, GatedAddParameters};
use clearform_kernels::gelu::{self, GeluParameters};
use clearform_kernels::modulated_layer_norm::{self, ModulatedLayerNormParameters};
use clearform_kernels::permute::{self, PermuteParameters};
use clearform_kernels::rms_norm_rope::{self, RmsNormRopeParameters, lanes};
use clearform_kernels::{Launch, Scalar};

/// [`crate::gelu`], or none where no kernel supports it.
pub(crate) fn gelu(x: &Tensor) -> Result<Option<Tensor>> {
    let Some(scalar) = supported(x) else { return Ok(None) };
    let Ok(launches) = gelu::launches(scalar, x.elem_count()) else { return Ok(None) };
    let words = (x.elem_count() / scalar.elements_per_word()) as u32;
    apply(x, GeluRows { launches, words }).map(Some)
}

/// [`crate::modulated_layer_norm`], or none where no kernel supports it.
pub(crate) fn modulated_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Option<Tensor>> {
    let Some(scalar) = supported(x).filter(|_| !shift.track_op() && !scale.track_op()) else { return Ok(None) };
    let (batch, tokens, width) = x.dims3()?;
    if shift.dims() != [batch, width] || scale.dims() != [batch, width] {
        bail!("modulated_layer_norm: x {:?}, shift {:?}, scale {:?}", x.dims(), shift.dims(), scale.dims());
    }
    let Ok(launches) = modulated_layer_norm::launches(scalar, batch * tokens, width) else { return Ok(None) };
    let shift = constant(shift, x.dtype())?;
    let scale = constant(scale, x.dtype())?;
    apply(x, LayerNormRows { launches, shift, scale, tokens, width, eps }).map(Some)
}

/// [`crate::rms_norm_rope`], or [`crate::rms_norm`] without a rotation; none where no kernel supports it.
pub(crate) fn rms_norm_rope(
    x: &Tensor,
    weight: &Tensor,
    rotation: Option<(&Tensor, &Tensor)>,
    eps: f64,
) -> Result<Option<Tensor>> {
    let Some(scalar) = supported(x).filter(|_| !weight.track_op() && x.rank() == 4) else { return Ok(None) };
    let (batch, tokens, heads, width) = x.dims4()?;
    let table = [tokens, width / 2];
    let mismatch = rotation.is_some_and(|(cos, sin)| cos.dims() != table || sin.dims() != table || width % 2 == 1);
    if weight.dims() != [width] || mismatch {
        bail!("rms_norm_rope: x {:?}, weight {:?}, rotation {rotation:?}", x.dims(), weight.dims());
    }
    let Ok(launches) = rms_norm_rope::launches(scalar, batch * tokens * heads, width) else { return Ok(None) };
    let constants = |(cos, sin)| -> Result<_> { Ok((constant(cos, DType::F32)?, constant(sin, DType::F32)?)) };
    let weight = constant(weight, x.dtype())?;
    let rotation = rotation.map(constants).transpose()?;
    apply(
        x,
        RmsNormRopeRows { launches, scalar, weight, rotation, rows: batch * tokens * heads, tokens, heads, width, eps },
    )
    .map(Some)
}

/// [`crate::gated_add`], or none where no kernel supports it.
pub(crate) fn gated_add(residual: &Tensor, gate: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
    let Some(scalar) = supported(x).filter(|_| !gate.track_op() && residual.dtype() == x.dtype()) else {
        return Ok(None);
    };
    let (batch, tokens, width) = x.dims3()?;
    if residual.dims() != x.dims() || gate.dims() != [batch, width] {
        bail!("gated_add: x {:?}, residual {:?}, gate {:?}", x.dims(), residual.dims(), gate.dims());
    }
    let Ok(launch) = gated_add::launch(scalar, batch * tokens, width) else { return Ok(None) };
    let row_words = width / scalar.elements_per_word();
    let gate = constant(gate, x.dtype())?;
    let operation = CudaGatedAddOp { launch, gate, tokens, row_words, words: batch * tokens * row_words };
    aligned(residual)?.apply_op2(&aligned(x)?, operation).map(Some)
}

/// Adds a bias in place to `rows`, a new tensor of `count` elements. Returns whether a kernel supported it.
pub(crate) fn add_bias(rows: &CudaStorage, count: usize, (bias, layout): (&CudaStorage, &Layout)) -> Result<bool> {
    let (width, Some(scalar)) = (layout.shape().elem_count(), scalar(rows.dtype())) else { return Ok(false) };
    let Ok(launch) = add_bias::launch(scalar, count / width.max(1), width) else { return Ok(false) };
    let converted;
    let (bias, layout) = if bias.dtype() == rows.dtype() && layout.is_contiguous() {
        (bias, layout.clone())
    } else {
        converted = bias.to_dtype(layout, rows.dtype())?;
        (&converted, Layout::contiguous(layout.shape()))
    };
    let out = address_of(rows, &Layout::contiguous(count))?;
    let bias = address_of(bias, &layout)?;
    if count == 0 || [out, bias].iter().any(|address| !address.is_multiple_of(WORD)) {
        return Ok(false);
    }
    let word_count = |count: usize| (count / scalar.elements_per_word()) as u32;
    let parameters = AddBiasParameters { x: out, bias, out, words: word_count(count), row_words: word_count(width) };
    // SAFETY: the addresses are those of tensors on this device of as many words, freed on its stream. The rows were
    // allocated for this call, so nothing else reads them meanwhile.
    unsafe { start(rows.device(), &launch, parameters) }?;
    Ok(true)
}

/// Reorders tokens: out(batch, i) = x(batch, from(i)). None where no kernel supports the problem.
///
/// # Shapes
/// x (batch, tokens, ..), from and its inverse (tokens) -> as x.
///
/// # Errors
/// Errors of the driver.
pub fn permute(x: &Tensor, from: &[u32], inverse: &[u32]) -> Result<Option<Tensor>> {
    let Some(scalar) = supported(x) else { return Ok(None) };
    let rows = x.dim(0)? * x.dim(1)?;
    let tokens = x.dim(1)?;
    let width = x.elem_count() / rows.max(1);
    let Ok(launch) = permute::launch(scalar, rows, width) else { return Ok(None) };
    let on_device = |order: &[u32]| Tensor::new(order, x.device());
    let words = width / scalar.elements_per_word();
    apply(
        x,
        PermuteRows {
            launch,
            from: on_device(from)?,
            inverse: on_device(inverse)?,
            tokens,
            words,
            count: rows * words,
        },
    )
    .map(Some)
}

fn supported(x: &Tensor) -> Option<Scalar> {
    scalar(x.dtype()).filter(|_| x.device().is_cuda() && x.elem_count() > 0)
}

/// Bytes of a vector load, to which the kernels' addresses must be aligned.
const WORD: u64 = 16;

fn constant(x: &Tensor, dtype: DType) -> Result<Tensor> {
    aligned(&x.detach().to_dtype(dtype)?)
}

/// Contiguous and aligned to [`WORD`]; a view may begin at any element.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let is_aligned = (x.layout().start_offset() * x.dtype().size_in_bytes()).is_multiple_of(WORD as usize);
    if x.is_contiguous() && !is_aligned { x.force_contiguous() } else { x.contiguous() }
}

/// A kernel over the rows of x.
trait RowKernel: Clone + Send + Sync + 'static {
    /// The operation's name in error messages.
    const NAME: &'static str;

    /// Starts the forward, or, with a gradient of the output, the gradient of x.
    fn start(&self, device: &CudaDevice, pointers: RowPointers) -> Result<()>;
}

/// Device addresses of a call, of tensors shaped as x.
#[derive(Clone, Copy)]
struct RowPointers {
    x: u64,
    grad: Option<u64>,
    out: u64,
}

fn apply<K: RowKernel>(x: &Tensor, kernel: K) -> Result<Tensor> {
    aligned(x)?.apply_op1(RowForward(kernel))
}

struct RowForward<K>(K);

struct RowGradient<K>(K);

impl<K: RowKernel> CustomOp1 for RowForward<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{}: expected a tensor on a GPU, found one on the CPU", K::NAME)
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let address = address_of(x, layout)?;
        let start = |out| self.0.start(x.device(), RowPointers { x: address, grad: None, out });
        Ok((launch_into(x, layout, start)?, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        x.detach().apply_op2_no_bwd(&aligned(&grad.detach())?, &RowGradient(self.0.clone())).map(Some)
    }
}

impl<K: RowKernel> CustomOp2 for RowGradient<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{}: expected tensors on a GPU, found them on the CPU", K::NAME)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        grad: &CudaStorage,
        grad_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let address = address_of(x, layout)?;
        let grad = address_of(grad, grad_layout)?;
        let start = |out| self.0.start(x.device(), RowPointers { x: address, grad: Some(grad), out });
        Ok((launch_into(x, layout, start)?, layout.shape().clone()))
    }
}

/// Allocates an output shaped as x and lets `start` launch the kernel that writes it.
fn launch_into(x: &CudaStorage, layout: &Layout, start: impl FnOnce(u64) -> Result<()>) -> Result<CudaStorage> {
    use candle_core::backend::BackendDevice as _;
    let device = x.device();
    // SAFETY: the kernels write every element.
    let out = unsafe { device.alloc_uninit(layout.shape(), x.dtype()) }?;
    start(address_of(&out, &Layout::contiguous(layout.shape()))?)?;
    Ok(out)
}

#[derive(Clone)]
struct GeluRows {
    launches: [Launch; 2],
    words: u32,
}

impl RowKernel for GeluRows {
    const NAME: &'static str = "gelu";

    fn start(&self, device: &CudaDevice, RowPointers { x, grad, out }: RowPointers) -> Result<()> {
        let parameters = GeluParameters { x, grad: grad.unwrap_or(0), out, words: self.words };
        // SAFETY: the addresses are those of tensors on this device of as many words, freed on its stream.
        unsafe { start(device, &self.launches[usize::from(grad.is_some())], parameters) }
    }
}

#[derive(Clone)]
struct LayerNormRows {
    launches: [Launch; 2],
    shift: Tensor,
    scale: Tensor,
    tokens: usize,
    width: usize,
    eps: f64,
}

impl RowKernel for LayerNormRows {
    const NAME: &'static str = "modulated_layer_norm";

    fn start(&self, device: &CudaDevice, RowPointers { x, grad, out }: RowPointers) -> Result<()> {
        let parameters = ModulatedLayerNormParameters {
            x,
            shift: address(&self.shift)?,
            scale: address(&self.scale)?,
            grad: grad.unwrap_or(0),
            out,
            tokens: self.tokens as i32,
            width: self.width as i32,
            eps: self.eps as f32,
        };
        // SAFETY: the addresses are those of tensors on this device, shaped as kernel.cu states, freed on its stream.
        unsafe { start(device, &self.launches[usize::from(grad.is_some())], parameters) }
    }
}

#[derive(Clone)]
struct RmsNormRopeRows {
    launches: [Launch; 2],
    scalar: Scalar,
    weight: Tensor,
    rotation: Option<(Tensor, Tensor)>,
    rows: usize,
    tokens: usize,
    heads: usize,
    width: usize,
    eps: f64,
}

impl RowKernel for RmsNormRopeRows {
    const NAME: &'static str = "rms_norm_rope";

    fn start(&self, device: &CudaDevice, RowPointers { x, grad, out }: RowPointers) -> Result<()> {
        let (cos, sin) = match &self.rotation {
            Some((cos, sin)) => (address(cos)?, address(sin)?),
            None => (0, 0),
        };
        let parameters = RmsNormRopeParameters {
            x,
            weight: address(&self.weight)?,
            grad: grad.unwrap_or(0),
            cos,
            sin,
            out,
            rows: self.rows as u32,
            tokens: self.tokens as u32,
            heads: self.heads as u32,
            width: self.width as i32,
            lanes: lanes(self.scalar, self.width) as i32,
            eps: self.eps as f32,
        };
        // SAFETY: the addresses are those of tensors on this device, shaped as kernel.cu states, freed on its stream.
        unsafe { start(device, &self.launches[usize::from(grad.is_some())], parameters) }
    }
}

#[derive(Clone)]
struct PermuteRows {
    launch: Launch,
    from: Tensor,
    inverse: Tensor,
    tokens: usize,
    words: usize,
    count: usize,
}

impl RowKernel for PermuteRows {
    const NAME: &'static str = "permute";

    fn start(&self, device: &CudaDevice, RowPointers { x, grad, out }: RowPointers) -> Result<()> {
        let from = if grad.is_some() { &self.inverse } else { &self.from };
        let parameters = PermuteParameters {
            x: grad.unwrap_or(x),
            out,
            from: address(from)?,
            count: self.count as u32,
            tokens: self.tokens as u32,
            words: self.words as u32,
        };
        // SAFETY: the addresses are those of tensors on this device, shaped as kernel.cu states, freed on its stream.
        unsafe { start(device, &self.launch, parameters) }
    }
}

/// residual + gate · x of (residual, x).
#[derive(Clone)]
struct CudaGatedAddOp {
    launch: Launch,
    gate: Tensor,
    tokens: usize,
    row_words: usize,
    words: usize,
}

impl CudaGatedAddOp {
    fn write(&self, residual: u64, x: (&CudaStorage, &Layout)) -> Result<(CudaStorage, Shape)> {
        let address_of_x = address_of(x.0, x.1)?;
        let gate = address(&self.gate)?;
        let start = |out| {
            let parameters = GatedAddParameters {
                residual,
                gate,
                x: address_of_x,
                out,
                words: self.words as u32,
                tokens: self.tokens as u32,
                row_words: self.row_words as u32,
            };
            // SAFETY: the addresses are those of tensors on this device, shaped as kernel.cu states, freed on its
            // stream.
            unsafe { start(x.0.device(), &self.launch, parameters) }
        };
        Ok((launch_into(x.0, x.1, start)?, x.1.shape().clone()))
    }
}

impl CustomOp2 for CudaGatedAddOp {
    fn name(&self) -> &'static str {
        "gated_add"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("gated_add: expected tensors on a GPU, found them on the CPU")
    }

    fn cuda_fwd(
        &self,
        residual: &CudaStorage,
        residual_layout: &Layout,
        x: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.write(address_of(residual, residual_layout)?, (x, layout))
    }

    fn bwd(
        &self,
        residual: &Tensor,
        x: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient_of_x = || aligned(&grad.detach())?.apply_op1_no_bwd(&CudaGatedInputGradient(self.clone()));
        Ok((residual.track_op().then(|| grad.clone()), x.track_op().then(gradient_of_x).transpose()?))
    }
}

/// gate · grad: the gradient of x from that of the sum.
struct CudaGatedInputGradient(CudaGatedAddOp);

impl CustomOp1 for CudaGatedInputGradient {
    fn name(&self) -> &'static str {
        "gated_add gradient of x"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("gated_add: expected a tensor on a GPU, found one on the CPU")
    }

    fn cuda_fwd(&self, grad: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.write(0, (grad, layout))
    }
}
