//! Our operations over rows on a GPU, each with the gradient of x. What they get besides x is taken as constant: where
//! it is tracked, or where no kernel takes the problem, they answer none and the plain reference serves.

use super::{address, address_of, number, start};
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
use clearform_kernels::{Launch, Number};

/// [`crate::gelu`].
pub(crate) fn gelu(x: &Tensor) -> Result<Option<Tensor>> {
    let Some(number) = taken(x) else { return Ok(None) };
    let Ok(launches) = gelu::launches(number, x.elem_count()) else { return Ok(None) };
    let words = (x.elem_count() / number.per_word()) as u32;
    apply(x, Gelu { launches, words }).map(Some)
}

/// [`crate::modulated_layer_norm`].
pub(crate) fn modulated_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Option<Tensor>> {
    let Some(number) = taken(x).filter(|_| !shift.track_op() && !scale.track_op()) else { return Ok(None) };
    let (batch, tokens, width) = x.dims3()?;
    if shift.dims() != [batch, width] || scale.dims() != [batch, width] {
        bail!("layer norm: x {:?}, shift {:?}, scale {:?}", x.dims(), shift.dims(), scale.dims());
    }
    let Ok(launches) = modulated_layer_norm::launches(number, batch * tokens, width) else { return Ok(None) };
    let (shift, scale) = (constant(shift, x.dtype())?, constant(scale, x.dtype())?);
    apply(x, Modulated { launches, shift, scale, tokens, width, eps }).map(Some)
}

/// [`crate::rms_norm_rope`], or without a rotation [`crate::rms_norm`].
pub(crate) fn rms_norm_rope(
    x: &Tensor,
    weight: &Tensor,
    rotation: Option<(&Tensor, &Tensor)>,
    eps: f64,
) -> Result<Option<Tensor>> {
    let Some(number) = taken(x).filter(|_| !weight.track_op() && x.rank() == 4) else { return Ok(None) };
    let (batch, tokens, heads, width) = x.dims4()?;
    let table = [tokens, width / 2];
    let misfits = rotation.is_some_and(|(cos, sin)| cos.dims() != table || sin.dims() != table || width % 2 == 1);
    if weight.dims() != [width] || misfits {
        bail!("rms_norm_rope: x {:?}, weight {:?}, rotation {rotation:?}", x.dims(), weight.dims());
    }
    let Ok(launches) = rms_norm_rope::launches(number, batch * tokens * heads, width) else { return Ok(None) };
    let angles = |(cos, sin)| -> Result<_> { Ok((constant(cos, DType::F32)?, constant(sin, DType::F32)?)) };
    let (weight, rotation) = (constant(weight, x.dtype())?, rotation.map(angles).transpose()?);
    apply(
        x,
        RmsNormRope { launches, number, weight, rotation, rows: batch * tokens * heads, tokens, heads, width, eps },
    )
    .map(Some)
}

/// [`crate::gated_add`].
pub(crate) fn gated_add(residual: &Tensor, gate: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
    let Some(number) = taken(x).filter(|_| !gate.track_op() && residual.dtype() == x.dtype()) else { return Ok(None) };
    let (batch, tokens, width) = x.dims3()?;
    if residual.dims() != x.dims() || gate.dims() != [batch, width] {
        bail!("gated_add: x {:?}, residual {:?}, gate {:?}", x.dims(), residual.dims(), gate.dims());
    }
    let Ok(launch) = gated_add::launch(number, batch * tokens, width) else { return Ok(None) };
    let row_words = width / number.per_word();
    let gate = constant(gate, x.dtype())?;
    let operation = Gated { launch, gate, tokens, row_words, words: batch * tokens * row_words };
    placed(residual)?.apply_op2(&placed(x)?, operation).map(Some)
}

/// Adds a bias to rows, `count` numbers that nothing else has seen yet; says whether a kernel took it.
pub(crate) fn add_bias(rows: &CudaStorage, count: usize, (bias, layout): (&CudaStorage, &Layout)) -> Result<bool> {
    let (width, Some(number)) = (layout.shape().elem_count(), number(rows.dtype())) else { return Ok(false) };
    let Ok(launch) = add_bias::launch(number, count / width.max(1), width) else { return Ok(false) };
    let converted;
    let (bias, layout) = if bias.dtype() == rows.dtype() && layout.is_contiguous() {
        (bias, layout.clone())
    } else {
        converted = bias.to_dtype(layout, rows.dtype())?;
        (&converted, Layout::contiguous(layout.shape()))
    };
    let (out, bias) = (address_of(rows, &Layout::contiguous(count))?, address_of(bias, &layout)?);
    if count == 0 || [out, bias].iter().any(|address| !address.is_multiple_of(WORD)) {
        return Ok(false);
    }
    let words = |count: usize| (count / number.per_word()) as u32;
    let parameters = AddBiasParameters { x: out, bias, out, words: words(count), row_words: words(width) };
    // SAFETY: the addresses are of tensors on this device, as large as the words say, and freed on its stream; nothing
    // else reads the rows meanwhile: they were made for this call.
    unsafe { start(rows.device(), &launch, parameters) }?;
    Ok(true)
}

/// Tokens in another order: out(batch, i) = x(batch, from(i)). None where no kernel takes the problem.
///
/// # Shapes
/// x (batch, tokens, ..), from and its inverse (tokens) -> as x.
///
/// # Errors
/// The driver refused.
pub fn permute(x: &Tensor, from: &[u32], inverse: &[u32]) -> Result<Option<Tensor>> {
    let Some(number) = taken(x) else { return Ok(None) };
    let (rows, tokens) = (x.dim(0)? * x.dim(1)?, x.dim(1)?);
    let width = x.elem_count() / rows.max(1);
    let Ok(launch) = permute::launch(number, rows, width) else { return Ok(None) };
    let order = |from: &[u32]| Tensor::new(from, x.device());
    let words = width / number.per_word();
    apply(x, Permute { launch, from: order(from)?, inverse: order(inverse)?, tokens, words, count: rows * words })
        .map(Some)
}

fn taken(x: &Tensor) -> Option<Number> {
    number(x.dtype()).filter(|_| x.device().is_cuda() && x.elem_count() > 0)
}

/// Bytes that a kernel loads at once, and of which its addresses are multiples.
const WORD: u64 = 16;

fn constant(x: &Tensor, dtype: DType) -> Result<Tensor> {
    placed(&x.detach().to_dtype(dtype)?)
}

/// Contiguous, and where a kernel can load it: a view may begin anywhere.
fn placed(x: &Tensor) -> Result<Tensor> {
    let is_aligned = (x.layout().start_offset() * x.dtype().size_in_bytes()).is_multiple_of(WORD as usize);
    if x.is_contiguous() && !is_aligned { x.force_contiguous() } else { x.contiguous() }
}

/// A kernel over the rows of x.
trait Rows: Clone + Send + Sync + 'static {
    /// The operation's name in error messages.
    const NAME: &'static str;

    /// Starts the forward, or, with a gradient of the output, the gradient of x.
    fn start(&self, device: &CudaDevice, at: Addresses) -> Result<()>;
}

/// Where a call's tensors lie, all shaped as x.
#[derive(Clone, Copy)]
struct Addresses {
    x: u64,
    grad: Option<u64>,
    out: u64,
}

fn apply<K: Rows>(x: &Tensor, kernel: K) -> Result<Tensor> {
    placed(x)?.apply_op1(Forward(kernel))
}

struct Forward<K>(K);

struct Gradient<K>(K);

impl<K: Rows> CustomOp1 for Forward<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{} for a GPU was given a tensor of the CPU", K::NAME)
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let address = address_of(x, layout)?;
        let start = |out| self.0.start(x.device(), Addresses { x: address, grad: None, out });
        Ok((written(x, layout, start)?, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        x.detach().apply_op2_no_bwd(&placed(&grad.detach())?, &Gradient(self.0.clone())).map(Some)
    }
}

impl<K: Rows> CustomOp2 for Gradient<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{} for a GPU was given tensors of the CPU", K::NAME)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        grad: &CudaStorage,
        grad_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (address, grad) = (address_of(x, layout)?, address_of(grad, grad_layout)?);
        let start = |out| self.0.start(x.device(), Addresses { x: address, grad: Some(grad), out });
        Ok((written(x, layout, start)?, layout.shape().clone()))
    }
}

/// Memory like x, which `start` has a kernel write.
fn written(x: &CudaStorage, layout: &Layout, start: impl FnOnce(u64) -> Result<()>) -> Result<CudaStorage> {
    use candle_core::backend::BackendDevice as _;
    let device = x.device();
    // SAFETY: the kernels write every number of it.
    let out = unsafe { device.alloc_uninit(layout.shape(), x.dtype()) }?;
    start(address_of(&out, &Layout::contiguous(layout.shape()))?)?;
    Ok(out)
}

#[derive(Clone)]
struct Gelu {
    launches: [Launch; 2],
    words: u32,
}

impl Rows for Gelu {
    const NAME: &'static str = "gelu";

    fn start(&self, device: &CudaDevice, Addresses { x, grad, out }: Addresses) -> Result<()> {
        let parameters = GeluParameters { x, grad: grad.unwrap_or(0), out, words: self.words };
        // SAFETY: the addresses are of tensors on this device of as many words, freed on its stream.
        unsafe { start(device, &self.launches[usize::from(grad.is_some())], parameters) }
    }
}

#[derive(Clone)]
struct Modulated {
    launches: [Launch; 2],
    shift: Tensor,
    scale: Tensor,
    tokens: usize,
    width: usize,
    eps: f64,
}

impl Rows for Modulated {
    const NAME: &'static str = "modulated_layer_norm";

    fn start(&self, device: &CudaDevice, Addresses { x, grad, out }: Addresses) -> Result<()> {
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
        // SAFETY: the addresses are of tensors on this device, shaped as kernel.cu says, freed on its stream.
        unsafe { start(device, &self.launches[usize::from(grad.is_some())], parameters) }
    }
}

#[derive(Clone)]
struct RmsNormRope {
    launches: [Launch; 2],
    number: Number,
    weight: Tensor,
    rotation: Option<(Tensor, Tensor)>,
    rows: usize,
    tokens: usize,
    heads: usize,
    width: usize,
    eps: f64,
}

impl Rows for RmsNormRope {
    const NAME: &'static str = "rms_norm_rope";

    fn start(&self, device: &CudaDevice, Addresses { x, grad, out }: Addresses) -> Result<()> {
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
            lanes: lanes(self.number, self.width) as i32,
            eps: self.eps as f32,
        };
        // SAFETY: the addresses are of tensors on this device, shaped as kernel.cu says, freed on its stream.
        unsafe { start(device, &self.launches[usize::from(grad.is_some())], parameters) }
    }
}

#[derive(Clone)]
struct Permute {
    launch: Launch,
    from: Tensor,
    inverse: Tensor,
    tokens: usize,
    words: usize,
    count: usize,
}

impl Rows for Permute {
    const NAME: &'static str = "permute";

    fn start(&self, device: &CudaDevice, Addresses { x, grad, out }: Addresses) -> Result<()> {
        let from = if grad.is_some() { &self.inverse } else { &self.from };
        let parameters = PermuteParameters {
            x: grad.unwrap_or(x),
            out,
            from: address(from)?,
            count: self.count as u32,
            tokens: self.tokens as u32,
            words: self.words as u32,
        };
        // SAFETY: the addresses are of tensors on this device, shaped as kernel.cu says, freed on its stream.
        unsafe { start(device, &self.launch, parameters) }
    }
}

/// residual + gate · x of (residual, x).
#[derive(Clone)]
struct Gated {
    launch: Launch,
    gate: Tensor,
    tokens: usize,
    row_words: usize,
    words: usize,
}

impl Gated {
    fn write(&self, residual: u64, x: (&CudaStorage, &Layout)) -> Result<(CudaStorage, Shape)> {
        let (address_of_x, gate) = (address_of(x.0, x.1)?, address(&self.gate)?);
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
            // SAFETY: the addresses are of tensors on this device, shaped as kernel.cu says, freed on its stream.
            unsafe { start(x.0.device(), &self.launch, parameters) }
        };
        Ok((written(x.0, x.1, start)?, x.1.shape().clone()))
    }
}

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated_add"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("gated_add for a GPU was given tensors of the CPU")
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
        let of_x = || placed(&grad.detach())?.apply_op1_no_bwd(&GateAlone(self.clone()));
        Ok((residual.track_op().then(|| grad.clone()), x.track_op().then(of_x).transpose()?))
    }
}

/// gate · x, which is the gradient of x from that of the sum.
struct GateAlone(Gated);

impl CustomOp1 for GateAlone {
    fn name(&self) -> &'static str {
        "gated_add gradient of x"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("gated_add for a GPU was given a tensor of the CPU")
    }

    fn cuda_fwd(&self, grad: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.write(0, (grad, layout))
    }
}
