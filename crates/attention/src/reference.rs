//! Attention in plain tensor algebra over a full mask: the specification of the fused kernels, and the fallback where
//! there is none. Accepts f64; candle differentiates it.

use crate::sequence::JointSequence;
use crate::{Attended, Geometry, Qkv, Window};
use candle_core::{D, Result, Tensor};

/// softmax(q kᵀ / √head_dim + mask) v. Image queries attend to the text, the image tokens in the window and pooled
/// context; text queries attend to the text and the whole image. No query attends to padded text.
///
/// # Shapes
/// As [`Attention::attend`](crate::Attention::attend).
///
/// # Errors
/// Shapes that contradict each other or `geometry`.
pub fn attend(image: Qkv, text: Option<Qkv>, geometry: &Geometry, window: &Window) -> Result<Attended> {
    let has_text = text.is_some();
    let sequence = JointSequence::new(image, text, geometry, window)?;
    sequence.split(&attend_joint(&sequence, geometry, window)?, has_text)
}

/// The same for all queries of a sequence.
///
/// # Shapes
/// As the sequence's query.
pub(crate) fn attend_joint(sequence: &JointSequence, geometry: &Geometry, window: &Window) -> Result<Tensor> {
    let heads_first = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let query = heads_first(&sequence.query)?;
    let key = heads_first(&sequence.key)?;
    let scale = 1.0 / (query.dim(D::Minus1)? as f64).sqrt();
    let scores = (query.matmul(&key.t()?)? * scale)?; // (batch, heads, queries, keys)
    let scores = scores.broadcast_add(&mask(sequence, geometry, window)?)?;
    let out = softmax(&scores)?.matmul(&heads_first(&sequence.value)?)?;
    out.transpose(1, 2)?.contiguous()
}

/// exp(x - max x) / Σ exp(x - max x) over the last dimension. The maximum cancels out, so it is detached.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let exponentials = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
}

/// 0 where a query attends to a key, -∞ elsewhere: (batch, 1, queries, keys).
fn mask(sequence: &JointSequence, geometry: &Geometry, window: &Window) -> Result<Tensor> {
    let (batch, queries, _, _) = sequence.query.dims4()?;
    let keys = sequence.key.dim(1)?;
    let visible_text = geometry.visible_text(batch, sequence.text)?;
    let mut values = Vec::with_capacity(batch * queries * keys);
    for entry in 0..batch {
        let is_visible = |key: usize| visible_text.as_ref().is_none_or(|visible| visible[entry][key]);
        for query in 0..queries {
            for key in 0..keys {
                let sees =
                    if key < sequence.text { is_visible(key) } else { sees(sequence, geometry, window, query, key) };
                values.push(if sees { 0f32 } else { f32::NEG_INFINITY });
            }
        }
    }
    let mask = Tensor::from_vec(values, (batch, 1, queries, keys), sequence.query.device())?;
    mask.to_dtype(sequence.query.dtype())
}

/// Whether a query attends to an image token or a pooled one.
fn sees(sequence: &JointSequence, geometry: &Geometry, window: &Window, query: usize, key: usize) -> bool {
    let is_text = query < sequence.text;
    let is_pooled = key >= sequence.text + sequence.image;
    match window.radius {
        _ if is_pooled => !is_text,
        None => true,
        Some(_) if is_text => true,
        Some(radius) => {
            let order = geometry.order();
            let query = query - sequence.text;
            let key = key - sequence.text;
            let dy = f64::from(order.rows[query] - order.rows[key]);
            let dx = f64::from(order.columns[query] - order.columns[key]);
            dx * dx + dy * dy < radius.tokens() * radius.tokens()
        }
    }
}
