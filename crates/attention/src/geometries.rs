//! [`Geometries`]: geometries that steps after each other share.

use crate::{Geometry, TokenGrid};
use std::sync::{Mutex, PoisonError};

/// How many are kept. A run draws pictures of few sizes.
const KEPT: usize = 4;

/// The geometries that were asked for last. The order of tokens and the lists of what each tile visits are made when a
/// grid first comes, and serve all layers of all later steps with that grid. A model holds one for its life.
#[derive(Debug, Default)]
pub struct Geometries(Mutex<Vec<Geometry>>);

impl Geometries {
    /// The geometry of one or more grids, one after the other in the sequence, without a text mask.
    pub fn of(&self, grids: Vec<TokenGrid>) -> Geometry {
        let known = |kept: &[Geometry]| kept.iter().position(|geometry| geometry.grids() == grids);
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = lock();
        if let Some(index) = known(&kept) {
            kept[..=index].rotate_right(1);
            return kept[0].clone();
        }
        drop(kept);
        let geometry = Geometry::new(grids.clone());
        let mut kept = lock();
        if known(&kept).is_none() {
            kept.insert(0, geometry.clone());
            kept.truncate(KEPT);
        }
        geometry
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Radius;
    use candle_core::{DType, Device, Tensor};
    use std::sync::Arc;

    fn grids(extents: &[(usize, usize)]) -> Vec<TokenGrid> {
        extents.iter().map(|(height, width)| TokenGrid::new(*height, *width).unwrap()).collect()
    }

    #[test]
    fn two_steps_over_one_grid_share_its_lists() {
        let (geometries, radius) = (Geometries::default(), Radius::new(3.0).unwrap());
        let lists = |extents: &[(usize, usize)]| geometries.of(grids(extents)).order().visits(radius);
        let first = lists(&[(9, 7)]);
        assert!(Arc::ptr_eq(&first, &lists(&[(9, 7)])));
        assert!(!Arc::ptr_eq(&first, &lists(&[(7, 9)])));
        assert!(!Arc::ptr_eq(&first, &lists(&[(9, 7), (9, 7)])));
        assert!(Arc::ptr_eq(&first, &lists(&[(9, 7)])));
    }

    #[test]
    fn what_was_not_asked_for_lately_is_forgotten() {
        let geometries = Geometries::default();
        for width in 1..=KEPT + 1 {
            geometries.of(grids(&[(2, width)]));
        }
        let kept = geometries.0.lock().unwrap();
        assert_eq!(kept.iter().map(|geometry| geometry.grids()[0].width).collect::<Vec<_>>(), [5, 4, 3, 2]);
    }

    #[test]
    fn a_text_mask_stays_with_its_step() {
        let geometries = Geometries::default();
        let mask = Tensor::new(&[[1u8, 0, 1]], &Device::Cpu).unwrap();
        let masked = geometries.of(grids(&[(2, 2)])).with_text_mask(mask);
        let rows = |geometry: &Geometry| geometry.visible_text(2, 3).unwrap();
        assert_eq!(rows(&masked), Some(vec![vec![true, false, true]; 2]));
        assert_eq!(rows(&masked.clone()), rows(&masked));
        assert!(masked.visible_text(2, 4).is_err());
        assert_eq!(rows(&geometries.of(grids(&[(2, 2)]))), None);
        let refused =
            geometries.of(grids(&[(2, 2)])).with_text_mask(Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap());
        assert_eq!(rows(&refused), Some(vec![vec![false; 3]; 2]));
    }
}
