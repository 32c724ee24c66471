//! [`JointSequence`]: the streams of a layer concatenated as [text, image in tile order, pooled].

use crate::{Attended, Geometry, Qkv, Window, pooled_context};
use candle_core::{DType, Result, Tensor, bail};
use clearform_ops::{concatenate, slice};

/// Queries, keys and values of both streams, with pooled context.
///
/// # Shapes
/// query (batch, text + image, heads, head_dim), key and value (batch, text + image + pooled, heads, head_dim).
pub(crate) struct JointSequence {
    pub query: Tensor,
    pub key: Tensor,
    pub value: Tensor,
    pub text: usize,
    pub image: usize,
}

impl JointSequence {
    /// Concatenates the streams, and pools context where the window has it. Each tensor is released once it is
    /// concatenated.
    ///
    /// # Errors
    /// Shapes that contradict each other or `geometry`.
    pub fn new(image: Qkv, text: Option<Qkv>, geometry: &Geometry, window: &Window) -> Result<Self> {
        check(&image, text.as_ref(), geometry)?;
        let pooled =
            |x: &Tensor| window.pool.as_ref().map(|weight| pooled_context::pooled(x, weight, geometry)).transpose();
        let pooled_key = pooled(&image.key)?;
        let pooled_value = pooled(&image.value)?;
        let text_tokens = text.as_ref().map_or(Ok(0), |text| text.query.dim(1))?;
        let [text_query, text_key, text_value] = match text {
            Some(Qkv { query, key, value }) => [query, key, value].map(Some),
            None => [None, None, None],
        };
        Ok(Self {
            query: joined([text_query, Some(image.query), None])?,
            key: joined([text_key, Some(image.key), pooled_key])?,
            value: joined([text_value, Some(image.value), pooled_value])?,
            text: text_tokens,
            image: geometry.tokens(),
        })
    }

    /// The same in another dtype; differentiable.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let [query, key, value] = [&self.query, &self.key, &self.value].map(|x| x.to_dtype(dtype));
        Ok(Self { query: query?, key: key?, value: value?, ..*self })
    }

    /// Splits the output of all queries into the streams.
    pub fn split(&self, out: &Tensor, has_text: bool) -> Result<Attended> {
        let text = if has_text { Some(slice(out, 1, 0, self.text)?) } else { None };
        Ok(Attended { image: slice(out, 1, self.text, self.image)?, text })
    }
}

fn joined(parts: [Option<Tensor>; 3]) -> Result<Tensor> {
    let parts: Vec<Tensor> = parts.into_iter().flatten().filter(|part| part.elem_count() > 0).collect();
    match &parts[..] {
        [part] => Ok(part.clone()),
        _ => concatenate(&parts.iter().collect::<Vec<_>>(), 1),
    }
}

fn check(image: &Qkv, text: Option<&Qkv>, geometry: &Geometry) -> Result<()> {
    let (batch, tokens, heads, head_dim) = image.query.dims4()?;
    if tokens != geometry.tokens() {
        bail!("attention over {tokens} image tokens: the geometry has {} in {:?}", geometry.tokens(), geometry.grids());
    }
    if batch == 0 || heads == 0 || tokens == 0 {
        bail!("attention over {:?}: expected at least one sample, one head and one image token", image.query.dims());
    }
    if !(1..=256).contains(&head_dim) {
        bail!("attention with head_dim {head_dim}: expected 1 to 256");
    }
    let text_tokens = text.map_or(Ok(0), |text| text.query.dim(1))?;
    let tensors = |qkv: &Qkv| [qkv.query.clone(), qkv.key.clone(), qkv.value.clone()];
    let images = tensors(image).map(|x| (x, tokens));
    let texts = text.map(tensors).into_iter().flatten().map(|x| (x, text_tokens));
    for (x, tokens) in images.into_iter().chain(texts) {
        if x.dims() != [batch, tokens, heads, head_dim] || x.dtype() != image.query.dtype() {
            let expected = (batch, tokens, heads, head_dim);
            bail!("attention over {:?} {:?}: expected {expected:?} {:?}", x.dims(), x.dtype(), image.query.dtype());
        }
    }
    Ok(())
}
