//! Level 5. The ways in which a network looks at an image when it is measured.

use crate::error::{Error, Result};

/// One way to show an image: mirrored or not, then moved. Where it was moved away it shows again, mirrored at its border.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Left to right.
    pub mirrored: bool,
    /// Pixels; up if negative.
    pub down: isize,
    /// Pixels; left if negative.
    pub right: isize,
}

impl View {
    /// The image as it is, which is the default.
    pub const PLAIN: Self = View { mirrored: false, down: 0, right: 0 };
    /// The image mirrored.
    pub const MIRRORED: Self = View { mirrored: true, ..Self::PLAIN };

    /// Whether an image `[C, H, W]` can be moved so far.
    pub(super) fn check(&self, [_, height, width]: [usize; 3]) -> Result<()> {
        let (rows, columns) = (self.down.unsigned_abs(), self.right.unsigned_abs());
        if rows < height && columns < width {
            return Ok(());
        }
        let problem = format!("images of {width}x{height} pixels cannot be moved by {columns}x{rows} pixels");
        Err(Error::invalid("view", problem, "show them plain or mirrored, or give larger images"))
    }
}

/// How many views of an image a network's scores are averaged over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Views {
    /// The image as it is.
    #[default]
    One,
    /// Plain and mirrored.
    Two,
    /// These two, and both again moved by a pixel down and right, and up and left; half of the weight is on what was not
    /// moved (Jordan 2024, arXiv 2404.00498).
    Six,
}

impl Views {
    /// The views, and the weight of each; these add up to 1.
    pub fn weighted(self) -> &'static [(View, f64)] {
        // What is mirrored after it was moved right is what is moved left after it was mirrored.
        const SIX: [(View, f64); 6] = [
            (View::PLAIN, 0.25),
            (View::MIRRORED, 0.25),
            (View { mirrored: false, down: 1, right: 1 }, 0.125),
            (View { mirrored: true, down: 1, right: -1 }, 0.125),
            (View { mirrored: false, down: -1, right: -1 }, 0.125),
            (View { mirrored: true, down: -1, right: 1 }, 0.125),
        ];
        match self {
            Views::One => &[(View::PLAIN, 1.0)],
            Views::Two => &[(View::PLAIN, 0.5), (View::MIRRORED, 0.5)],
            Views::Six => &SIX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_add_up_and_every_view_has_its_mirror_image() {
        for (views, count) in [(Views::One, 1), (Views::Two, 2), (Views::Six, 6)] {
            let weighted = views.weighted();
            assert_eq!((weighted.len(), weighted.iter().map(|(_, weight)| weight).sum()), (count, 1.0), "{views:?}");
            for &(view, weight) in weighted.iter().filter(|_| count > 1) {
                let mirrored = View { mirrored: !view.mirrored, right: -view.right, ..view };
                assert!(weighted.contains(&(mirrored, weight)), "{views:?}: {view:?}");
            }
        }
        assert_eq!(View::PLAIN, View::default());
    }

    #[test]
    fn images_that_cannot_be_moved_are_refused() {
        let moved = Views::Six.weighted()[2].0;
        moved.check([3, 2, 2]).unwrap();
        View::MIRRORED.check([3, 1, 1]).unwrap();
        for (dim, size) in [([3, 1, 9], "9x1"), ([3, 9, 1], "1x9")] {
            let error = moved.check(dim).unwrap_err().to_string();
            assert!(error.contains("view") && error.contains(size) && error.contains("1x1 pixels"), "{error}");
        }
    }
}
