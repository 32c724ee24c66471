//! [`Geometries`]: a cache of geometries, shared by successive steps.

use crate::{Geometry, TokenGrid};
use std::sync::{Mutex, PoisonError};

/// Geometries that are kept. A run generates images of few sizes, so a handful is enough.
const KEPT: usize = 4;

/// The geometries that were used last. A geometry computes its order of tokens and its lists of visits once, for all
/// layers and steps with the same grids. Each model has one cache.
#[derive(Debug, Default)]
pub struct Geometries(Mutex<Vec<Geometry>>);

impl Geometries {
    /// The geometry of one or more grids in sequence order, without a text mask.
    pub fn get(&self, grids: Vec<TokenGrid>) -> Geometry {
        let position_of = |kept: &[Geometry]| kept.iter().position(|geometry| geometry.grids() == grids);
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = lock();
        if let Some(index) = position_of(&kept) {
            kept[..=index].rotate_right(1);
            return kept[0].clone();
        }
        drop(kept);
        let geometry = Geometry::new(grids.clone());
        let mut kept = lock();
        if position_of(&kept).is_none() {
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

    fn grids(sizes: &[(usize, usize)]) -> Vec<TokenGrid> {
        sizes.iter().map(|(height, width)| TokenGrid::new(*height, *width).unwrap()).collect()
    }

    #[test]
    fn steps_with_the_same_grids_share_lists() {
        let geometries = Geometries::default();
        let radius = Radius::new(3.0).unwrap();
        let lists = |sizes: &[(usize, usize)]| geometries.get(grids(sizes)).order().visits(radius);
        let first = lists(&[(9, 7)]);
        assert!(Arc::ptr_eq(&first, &lists(&[(9, 7)])));
        assert!(!Arc::ptr_eq(&first, &lists(&[(7, 9)])));
        assert!(!Arc::ptr_eq(&first, &lists(&[(9, 7), (9, 7)])));
        assert!(Arc::ptr_eq(&first, &lists(&[(9, 7)])));
    }

    #[test]
    fn the_least_recently_used_geometry_is_dropped() {
        let geometries = Geometries::default();
        for width in 1..=KEPT + 1 {
            geometries.get(grids(&[(2, width)]));
        }
        let kept = geometries.0.lock().unwrap();
        assert_eq!(kept.iter().map(|geometry| geometry.grids()[0].width).collect::<Vec<_>>(), [5, 4, 3, 2]);
    }

    #[test]
    fn a_text_mask_stays_with_its_step() {
        let geometries = Geometries::default();
        let mask = Tensor::new(&[[1u8, 0, 1]], &Device::Cpu).unwrap();
        let masked = geometries.get(grids(&[(2, 2)])).with_text_mask(mask);
        let rows = |geometry: &Geometry| geometry.visible_text(2, 3).unwrap();
        assert_eq!(rows(&masked), Some(vec![vec![true, false, true]; 2]));
        assert_eq!(rows(&masked.clone()), rows(&masked));
        assert!(masked.visible_text(2, 4).is_err());
        assert_eq!(rows(&geometries.get(grids(&[(2, 2)]))), None);
        let refused =
            geometries.get(grids(&[(2, 2)])).with_text_mask(Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap());
        assert_eq!(rows(&refused), Some(vec![vec![false; 3]; 2]));
    }
}
