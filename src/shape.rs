//! Level 1. Sizes of convolutions and pools: the only place where an output size is computed.
//!
//! For one axis with input size `H`, padding `p0` before and `p1` after, window `K`, dilation `d` and stride `s`:
//!
//! ```text
//! H' = floor((H + p0 + p1 - d (K - 1) - 1) / s) + 1
//! ```
//!
//! as in Dumoulin & Visin, *A guide to convolution arithmetic for deep learning* (2016). A row that does not fill a
//! whole stride at the end is dropped.
//!
//! A shape is checked when it is made and cannot be changed afterwards: its sizes are read by methods of their names.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Zero padding around an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Padding {
    /// None at all.
    #[default]
    Valid,
    /// As much as keeps `H' = ceil(H / stride)`; an odd cell goes to the bottom and right.
    Same,
    /// The same number of cells, in pixels, on all four sides (`pad` in CS231n).
    All(usize),
    /// Pixels on each side.
    Sides {
        /// Rows above.
        top: usize,
        /// Rows below.
        bottom: usize,
        /// Columns to the left.
        left: usize,
        /// Columns to the right.
        right: usize,
    },
}

/// One axis of a sliding window, sizes in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    pub(crate) input: usize,
    pub(crate) window: usize,
    pub(crate) stride: usize,
    pub(crate) dilation: usize,
    pub(crate) before: usize,
    pub(crate) after: usize,
    pub(crate) output: usize,
}

/// Methods that read a size of a checked shape.
macro_rules! sizes {
    ($($(#[$doc:meta])* $name:ident: $type:ty),+ $(,)?) => {
        $($(#[$doc])* pub fn $name(&self) -> $type {
            self.$name
        })+
    };
}

/// More elements than any memory holds, and still so few that sums and products with them do not overflow.
const MOST_ELEMENTS: usize = 1 << 48;

/// Whether an array of these sizes may be.
pub(crate) fn check_elements(op: &'static str, sizes: &[usize]) -> Result<()> {
    let elements = sizes.iter().try_fold(1_usize, |elements, &size| elements.checked_mul(size));
    if elements.is_some_and(|elements| elements <= MOST_ELEMENTS) {
        return Ok(());
    }
    Err(Error::invalid(op, format!("{sizes:?} are more elements than a memory holds"), "use smaller sizes"))
}

impl Axis {
    /// Checks the sizes and computes `output`. `pad` is `None` for 'same'.
    fn new(
        op: &'static str,
        name: &str,
        input: usize,
        window: usize,
        stride: usize,
        dilation: usize,
        pad: AxisPadding,
    ) -> Result<Self> {
        for (what, value) in [("stride", stride), ("dilation", dilation), ("window", window), ("input", input)] {
            if value == 0 {
                return Err(Error::invalid(op, format!("the {what} of the {name} is 0"), "give at least 1"));
            }
        }
        let too_large =
            || Error::invalid(op, format!("the {name} overflows the machine's integers"), "use smaller sizes");
        let span = (window - 1).checked_mul(dilation).and_then(|s| s.checked_add(1)).ok_or_else(too_large)?;
        let (before, after) = match pad {
            Some(sides) => sides,
            None => {
                let reach = (input.div_ceil(stride) - 1).checked_mul(stride).and_then(|r| r.checked_add(span));
                let total = reach.ok_or_else(too_large)?.saturating_sub(input);
                (total / 2, total - total / 2)
            }
        };
        let padded = input.checked_add(before).and_then(|p| p.checked_add(after)).ok_or_else(too_large)?;
        if span > padded {
            return Err(Error::invalid(
                op,
                format!(
                    "a window of {span} does not fit the padded {name} of {padded} (input {input}, padding {before} + {after})"
                ),
                "use a smaller filter or window, or more padding",
            ));
        }
        Ok(Axis { input, window, stride, dilation, before, after, output: 0 }.counted())
    }

    sizes! {
        /// Input size.
        input: usize,
        /// Window size, undilated.
        window: usize,
        /// Distance between windows.
        stride: usize,
        /// Distance between cells of a window.
        dilation: usize,
        /// Padding before the first pixel.
        before: usize,
        /// Padding after the last pixel.
        after: usize,
        /// Output size.
        output: usize,
    }

    /// Index of the input pixel under cell `cell` of window `out`, or `None` in the padding.
    pub fn source(&self, out: usize, cell: usize) -> Option<usize> {
        (out * self.stride + cell * self.dilation).checked_sub(self.before).filter(|&i| i < self.input)
    }

    /// The windows whose cell `cell` lies inside the input: a half-open range of outputs, possibly empty.
    pub fn inside(&self, cell: usize) -> std::ops::Range<usize> {
        let offset = cell * self.dilation;
        let first = self.before.saturating_sub(offset).div_ceil(self.stride).min(self.output);
        let end = (self.input + self.before).saturating_sub(offset).div_ceil(self.stride).min(self.output);
        first..end.max(first)
    }

    /// Cells of the padded input from the first to the last that a window sees, where there are `outputs` windows.
    fn reach(&self, outputs: usize) -> usize {
        (outputs - 1) * self.stride + (self.window - 1) * self.dilation + 1
    }

    /// The same windows over the padded input, as far as they see it.
    pub(crate) fn filled_up(&self) -> Self {
        Axis { input: self.reach(self.output), before: 0, after: 0, ..*self }
    }

    /// How much of the input there is up to the last pixel that a window sees.
    pub(crate) fn seen(&self) -> usize {
        self.reach(self.output).saturating_sub(self.before).min(self.input)
    }

    /// Without the padding after the last pixel that the first `outputs` windows do not see. There may still be more windows,
    /// where the input alone has them.
    fn trimmed(self, outputs: usize) -> Self {
        let after = self.after.min(self.reach(outputs).saturating_sub(self.before + self.input));
        Axis { after, ..self }.counted()
    }

    /// With as many outputs as there are windows in the padded input, which has one.
    fn counted(self) -> Self {
        let padded = self.before + self.input + self.after;
        Axis { output: (padded - self.reach(1)) / self.stride + 1, ..self }
    }

    /// Whether windows neither overlap nor leave gaps nor touch padding: they tile the input, but for a rest at its end that is
    /// shorter than a window.
    pub fn tiles(&self) -> bool {
        self.window == self.stride && self.dilation == 1 && self.before == 0 && self.after == 0
    }
}

/// Pixels before and after an axis; `None` for 'same'.
type AxisPadding = Option<(usize, usize)>;

/// The padding of the vertical and of the horizontal axis.
fn sides(padding: Padding) -> (AxisPadding, AxisPadding) {
    match padding {
        Padding::Valid => (Some((0, 0)), Some((0, 0))),
        Padding::Same => (None, None),
        Padding::All(p) => (Some((p, p)), Some((p, p))),
        Padding::Sides { top, bottom, left, right } => (Some((top, bottom)), Some((left, right))),
    }
}

/// How a convolution is computed: which product stands for it. All give the same result but for rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// The one that is measured to be fastest: see [`crate::ops::conv::ConvPlan`].
    #[default]
    Auto,
    /// im2col and one product per tile. Works for everything.
    Im2col,
    /// Winograd's F(6x6, 3x3), or of smaller tiles, with a fifth to half of the multiplications; 3x3 filters, stride 1, no
    /// dilation, one group, `f32`. See [`crate::ops::conv::winograd`].
    Winograd,
    /// Channel by channel, without any product; one channel per group. See [`crate::ops::conv::depthwise`].
    Depthwise,
}

/// What a convolution does besides its filters. `Conv2d::default()` is stride 1, no padding, dilation 1, one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Conv2d {
    /// Distance between receptive fields, in pixels (vertical, horizontal).
    pub stride: (usize, usize),
    /// Zero padding.
    pub padding: Padding,
    /// Distance between the cells of a filter, in pixels (vertical, horizontal).
    pub dilation: (usize, usize),
    /// Number of groups; channels and filters are divided among them. As many groups as channels is a depthwise convolution.
    pub groups: usize,
    /// How it is to be computed.
    pub algorithm: Algorithm,
}

impl Default for Conv2d {
    fn default() -> Self {
        Conv2d { stride: (1, 1), padding: Padding::Valid, dilation: (1, 1), groups: 1, algorithm: Algorithm::Auto }
    }
}

/// All sizes of one convolution, checked: x `(N, C, H, W)`, w `(F, C / groups, KH, KW)`, out `(N, F, H', W')`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dShape {
    pub(crate) images: usize,
    pub(crate) channels: usize,
    pub(crate) filters: usize,
    pub(crate) groups: usize,
    pub(crate) rows: Axis,
    pub(crate) cols: Axis,
    /// How it is to be computed: a wish, which [`crate::ops::conv::ConvPlan`] grants or refuses.
    pub(crate) wish: Algorithm,
}

impl Conv2dShape {
    /// Checks that `x` `(N, C, H, W)` and `w` `(F, C / groups, KH, KW)` fit together under `conv`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the channels do not match, [`Error::Invalid`] for zero sizes, groups that do not divide the
    /// channels and filters, or a filter larger than the padded input.
    pub fn new(x: [usize; 4], w: [usize; 4], conv: &Conv2d) -> Result<Self> {
        let ([images, channels, h, wd], [filters, group_channels, kh, kw]) = (x, w);
        let groups = conv.groups;
        if groups == 0 || channels % groups != 0 || filters % groups != 0 || channels == 0 || filters == 0 {
            return Err(Error::invalid(
                "conv2d",
                format!("{groups} groups do not divide {channels} channels and {filters} filters"),
                "choose groups that divide both",
            ));
        }
        if group_channels != channels / groups {
            return Err(Error::Shape {
                op: "conv2d",
                what: "w",
                expected: format!(
                    "(F, {}, KH, KW) for an input of {channels} channels in {groups} group(s)",
                    channels / groups
                ),
                got: w.to_vec(),
            });
        }
        let (pad_rows, pad_cols) = sides(conv.padding);
        let rows = Axis::new("conv2d", "height", h, kh, conv.stride.0, conv.dilation.0, pad_rows)?;
        let cols = Axis::new("conv2d", "width", wd, kw, conv.stride.1, conv.dilation.1, pad_cols)?;
        check_elements("conv2d", &[images, channels, h, wd])?;
        check_elements("conv2d", &[images, filters, rows.output, cols.output])?;
        // What one image takes to multiply, too: the largest of what is worked out about a convolution.
        check_elements("conv2d", &[filters, group_channels, kh, kw, rows.output, cols.output])?;
        Ok(Conv2dShape { images, channels, filters, groups, rows, cols, wish: conv.algorithm })
    }

    sizes! {
        /// Images `N`.
        images: usize,
        /// Input channels `C`, over all groups.
        channels: usize,
        /// Filters `F`, over all groups: the output channels.
        filters: usize,
        /// Number of groups.
        groups: usize,
        /// Vertical axis: `H`, `KH`, `H'`.
        rows: Axis,
        /// Horizontal axis: `W`, `KW`, `W'`.
        cols: Axis,
    }

    /// `[N, C, H, W]`
    pub fn x(&self) -> [usize; 4] {
        [self.images, self.channels, self.rows.input, self.cols.input]
    }

    /// `[F, C / groups, KH, KW]`
    pub fn w(&self) -> [usize; 4] {
        [self.filters, self.channels / self.groups, self.rows.window, self.cols.window]
    }

    /// `[N, F, H', W']`
    pub fn out(&self) -> [usize; 4] {
        [self.images, self.filters, self.rows.output, self.cols.output]
    }

    /// Pixels of one input channel, `H W`.
    pub fn in_plane(&self) -> usize {
        self.rows.input * self.cols.input
    }

    /// Pixels of one output channel, `H' W'`.
    pub fn out_plane(&self) -> usize {
        self.rows.output * self.cols.output
    }

    /// Length of one column of im2col, `K = C / groups * KH * KW`: the summed dimension of the product.
    pub fn column(&self) -> usize {
        self.channels / self.groups * self.rows.window * self.cols.window
    }

    /// Floating-point operations of the forward product (a multiply-add counts 2); backward takes twice as many.
    pub fn flops(&self) -> usize {
        2 * self.images * self.filters * self.out_plane() * self.column()
    }

    /// The same convolution over another number of images.
    pub fn with_images(self, images: usize) -> Self {
        Conv2dShape { images, ..self }
    }

    /// Without what is in the output for the sake of padding below and to the right, beyond its first `rows` and `cols`.
    pub(crate) fn trimmed(self, rows: usize, cols: usize) -> Self {
        Conv2dShape { rows: self.rows.trimmed(rows), cols: self.cols.trimmed(cols), ..self }
    }
}

/// A pooling window. CS231n's 2x2 with stride 2 is `Pool2d::square(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool2d {
    /// Window size, in pixels (vertical, horizontal).
    pub window: (usize, usize),
    /// Distance between windows, in pixels (vertical, horizontal).
    pub stride: (usize, usize),
    /// Padding: never the maximum in max pooling, counted as zeros in average pooling.
    pub padding: Padding,
}

impl Pool2d {
    /// A square window with the stride of its size and no padding.
    pub fn square(size: usize) -> Self {
        Pool2d { window: (size, size), stride: (size, size), padding: Padding::Valid }
    }
}

/// All sizes of one pooling, checked: x `(N, C, H, W)`, out `(N, C, H', W')`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool2dShape {
    pub(crate) images: usize,
    pub(crate) channels: usize,
    pub(crate) rows: Axis,
    pub(crate) cols: Axis,
}

impl Pool2dShape {
    /// Checks that the window fits `x` `(N, C, H, W)`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for zero sizes, a window larger than the padded input, padding as large as the window
    /// (a window could then lie in padding alone).
    pub fn new(x: [usize; 4], pool: &Pool2d) -> Result<Self> {
        let (pad_rows, pad_cols) = sides(pool.padding);
        let rows = Axis::new("pool2d", "height", x[2], pool.window.0, pool.stride.0, 1, pad_rows)?;
        let cols = Axis::new("pool2d", "width", x[3], pool.window.1, pool.stride.1, 1, pad_cols)?;
        for axis in [rows, cols] {
            if axis.before >= axis.window || axis.after >= axis.window {
                return Err(Error::invalid(
                    "pool2d",
                    format!(
                        "padding {} + {} leaves a window of {} without a pixel",
                        axis.before, axis.after, axis.window
                    ),
                    "pad by less than the window",
                ));
            }
        }
        Ok(Pool2dShape { images: x[0], channels: x[1], rows, cols })
    }

    sizes! {
        /// Images `N`.
        images: usize,
        /// Channels `C`.
        channels: usize,
        /// Vertical axis: `H`, `KH`, `H'`.
        rows: Axis,
        /// Horizontal axis: `W`, `KW`, `W'`.
        cols: Axis,
    }

    /// Checks what max pooling needs besides: the argmax of a window is one byte.
    pub(crate) fn check_max(&self) -> Result<()> {
        let cells = self.rows.window.saturating_mul(self.cols.window);
        if cells > 255 {
            return Err(Error::invalid(
                "max_pool2d",
                format!("a window of {}x{} has {cells} cells, more than 255", self.rows.window, self.cols.window),
                "use a smaller window or two pools in a row",
            ));
        }
        Ok(())
    }

    /// `[N, C, H, W]`
    pub fn x(&self) -> [usize; 4] {
        [self.images, self.channels, self.rows.input, self.cols.input]
    }

    /// `[N, C, H', W']`
    pub fn out(&self) -> [usize; 4] {
        [self.images, self.channels, self.rows.output, self.cols.output]
    }

    /// Pixels of one input channel, `H W`.
    pub fn in_plane(&self) -> usize {
        self.rows.input * self.cols.input
    }

    /// Pixels of one output channel, `H' W'`.
    pub fn out_plane(&self) -> usize {
        self.rows.output * self.cols.output
    }

    /// Whether the windows tile the input, but for a rest at its ends: the reshape fast path applies.
    pub fn tiles(&self) -> bool {
        self.rows.tiles() && self.cols.tiles()
    }

    /// The same pooling over another number of images.
    pub fn with_images(self, images: usize) -> Self {
        Pool2dShape { images, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_sizes_follow_the_formula() {
        // (input, window, stride, dilation, before, after) -> output, counted by hand.
        for ((h, k, s, d, p0, p1), want) in [
            ((4, 4, 2, 1, 1, 1), 2),   // CS231n's fixture
            ((31, 3, 2, 1, 1, 1), 16), // CS231n's bench
            ((32, 7, 1, 1, 3, 3), 32), // CS231n's network
            ((5, 2, 2, 1, 0, 0), 2),   // a row left over is dropped
            ((7, 3, 1, 2, 0, 0), 3),   // dilation widens the window to 5
            ((3, 3, 1, 1, 0, 2), 3),   // asymmetric
        ] {
            let axis = Axis::new("t", "height", h, k, s, d, Some((p0, p1))).unwrap();
            assert_eq!(axis.output, want, "{axis:?}");
        }
        let same = Axis::new("t", "height", 5, 2, 1, 1, None).unwrap();
        assert_eq!((same.output, same.before, same.after), (5, 0, 1), "the odd cell goes after");
    }

    #[test]
    fn what_only_padding_adds_can_be_trimmed() {
        // (input, window, stride, dilation, before, after), outputs -> after, output
        for ((h, k, s, d, p0, p1), outputs, want) in [
            ((31, 3, 1, 1, 1, 1), 30, (0, 30)),
            ((31, 3, 1, 1, 1, 1), 31, (1, 31)),
            ((31, 3, 1, 1, 1, 1), 4, (0, 30)), // the input alone has so many
            ((8, 3, 1, 2, 2, 2), 7, (1, 7)),
            ((9, 3, 2, 1, 1, 1), 4, (0, 4)),
            ((9, 3, 2, 1, 1, 2), 5, (1, 5)), // a cell that no window sees
            ((2, 3, 1, 1, 3, 3), 2, (0, 3)), // the first windows are in padding alone
            ((1, 3, 1, 1, 1, 1), 1, (1, 1)),
        ] {
            let axis = Axis::new("t", "height", h, k, s, d, Some((p0, p1))).unwrap();
            let trimmed = axis.trimmed(outputs);
            assert_eq!((trimmed.after, trimmed.output), want, "{axis:?}, {outputs} outputs");
            assert_eq!(trimmed, Axis::new("t", "height", h, k, s, d, Some((p0, trimmed.after))).unwrap());
        }
        let seen = |h, k, s, p0, p1| Axis::new("t", "height", h, k, s, 1, Some((p0, p1))).unwrap().seen();
        assert_eq!([seen(31, 2, 2, 0, 0), seen(32, 2, 2, 0, 0), seen(7, 3, 2, 1, 1)], [30, 32, 7]);
        assert_eq!([seen(8, 3, 2, 1, 1), seen(15, 3, 3, 1, 1)], [8, 14], "padding");
    }

    #[test]
    fn inside_agrees_with_source() {
        for (h, k, s, d, p0, p1) in
            [(7, 3, 2, 1, 1, 1), (5, 3, 1, 2, 2, 2), (4, 3, 3, 1, 0, 2), (2, 5, 1, 1, 4, 4), (1, 3, 2, 2, 5, 5)]
        {
            let axis = Axis::new("t", "height", h, k, s, d, Some((p0, p1))).unwrap();
            for cell in 0..k {
                let by_source: Vec<_> = (0..axis.output).filter(|&o| axis.source(o, cell).is_some()).collect();
                assert_eq!(axis.inside(cell).collect::<Vec<_>>(), by_source, "{axis:?} cell {cell}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error_with_the_fix() {
        let conv = Conv2d { padding: Padding::All(1), ..Conv2d::default() };
        let error = Conv2dShape::new([1, 3, 4, 4], [8, 3, 7, 7], &conv).unwrap_err().to_string();
        assert!(
            error.contains("window of 7") && error.contains("padded height of 6") && error.contains("smaller filter"),
            "{error}"
        );
        assert!(matches!(Conv2dShape::new([1, 3, 8, 8], [8, 4, 3, 3], &conv), Err(Error::Shape { what: "w", .. })));
        assert!(Conv2dShape::new([1, 3, 8, 8], [8, 3, 3, 3], &Conv2d { stride: (0, 1), ..conv }).is_err());
        assert!(Conv2dShape::new([1, 3, 8, 8], [8, 3, 3, 3], &Conv2d { groups: 2, ..conv }).is_err());
        assert!(Pool2dShape::new([1, 1, 4, 4], &Pool2d { padding: Padding::All(2), ..Pool2d::square(2) }).is_err());
    }

    /// Configurations are files' and programs' to write: all of it is optional, a misspelt field is not.
    #[test]
    fn configurations_are_read_and_written() {
        let conv: Conv2d = serde_json::from_str(r#"{"padding": "same", "algorithm": "im2col"}"#).unwrap();
        assert_eq!(conv, Conv2d { padding: Padding::Same, algorithm: Algorithm::Im2col, ..Conv2d::default() });
        for padding in
            [Padding::Valid, Padding::All(2), Padding::Sides { top: 1, bottom: 2, left: 3, right: 4 }, Padding::Same]
        {
            let conv = Conv2d { padding, stride: (2, 1), ..conv };
            assert_eq!(serde_json::from_str::<Conv2d>(&serde_json::to_string(&conv).unwrap()).unwrap(), conv);
            let pool = Pool2d { padding, ..Pool2d::square(3) };
            assert_eq!(serde_json::from_str::<Pool2d>(&serde_json::to_string(&pool).unwrap()).unwrap(), pool);
        }
        assert!(serde_json::from_str::<Conv2d>(r#"{"strides": [2, 2]}"#).is_err());
    }
}
