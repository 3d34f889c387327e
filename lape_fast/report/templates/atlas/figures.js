// Figures: each has a size, draws itself on a surface, and tells of a grid of cells what stands in one and where it is.

const LABEL = 150;
const PAD = 10;
const LEGEND = 34;

const labelWidth = (labels) => Math.min(LABEL, Math.max(...labels.map((label) => textWidth(label))) + 8);

// rows, columns: labels. value(r, c): a number or null. colour(value): of its cell. describe(r, c): a sentence.
// open(r, c): called on click and Enter. legend: {from, to, colours}. tree: merges to draw at the left.
function heatMap({ rows, columns, value, colour, describe, open, legend, cell = [15, 15], tree, columnTitle }) {
  const [cellWidth, cellHeight] = cell;
  const left = labelWidth(rows) + (tree ? 90 : 0) + PAD;
  const tall = columns.some((label) => label.length > 3);
  const heading = tall ? labelWidth(columns) : 18;
  const top = LEGEND + heading + (columnTitle ? 16 : 0);
  const width = left + columns.length * cellWidth + PAD;
  // A narrow map still has room for its legend.
  const height = top + rows.length * cellHeight + PAD;
  // Of many narrow columns only some are named.
  const every = tall ? 1 : Math.ceil(22 / cellWidth);
  return {
    width: Math.max(width, 280),
    height,
    rows: rows.length,
    columns: columns.length,
    describe,
    open,
    box: (row, column) => [left + column * cellWidth, top + row * cellHeight, cellWidth, cellHeight],
    find(x, y) {
      const row = Math.floor((y - top) / cellHeight);
      const column = Math.floor((x - left) / cellWidth);
      const inside = row >= 0 && row < rows.length && column >= 0 && column < columns.length;
      return inside ? [row, column] : null;
    },
    draw(surface, { text, quiet, none }) {
      drawLegend(surface, legend, quiet);
      if (columnTitle) surface.text(columnTitle, left, LEGEND + 6, { colour: quiet });
      columns.forEach((label, column) => {
        const x = left + (column + 0.5) * cellWidth;
        if (tall) surface.text(fitted(label, heading - 6), x, top - 5, { colour: text, upright: true });
        else if (column % every === 0) surface.text(label, x, top - 9, { colour: text, size: 11, align: "center" });
      });
      rows.forEach((label, row) => {
        const y = top + (row + 0.5) * cellHeight;
        surface.text(fitted(label, LABEL - 8), left - 6, y, { colour: text, align: "right", size: Math.min(12, cellHeight) });
        columns.forEach((_, column) => {
          const found = value(row, column);
          const [x, , wide, high] = this.box(row, column);
          surface.rect(x, top + row * cellHeight, wide - 0.5, high - 0.5, found === null ? none : colour(found));
        });
      });
      if (tree) drawTree(surface, tree, rows.length, top, cellHeight, quiet);
    },
  };
}

function drawLegend(surface, { from, to, colours, title }, ink) {
  const width = 120;
  surface.text(from, 0, 10, { colour: ink, size: 11 });
  const start = textWidth(from, 11) + 6;
  for (let x = 0; x < width; x += 2) surface.rect(start + x, 4, 2, 12, colours(x / width));
  surface.text(to, start + width + 6, 10, { colour: ink, size: 11 });
  surface.text(title, start + width + 16 + textWidth(to, 11), 10, { colour: ink, size: 11 });
}

// The tree of merges: a cluster's line stands further left, the less its members have in common.
function drawTree(surface, merges, leaves, top, cellHeight, ink) {
  const strongest = Math.max(...merges.map(([, , alike]) => alike), 1e-9);
  const x = (alike) => 4 + 80 * Math.sqrt(Math.max(alike, 0) / strongest);
  const places = Array.from({ length: leaves }, (_, leaf) => [84, top + (leaf + 0.5) * cellHeight]);
  for (const [left, right, alike] of merges) {
    const [[leftX, leftY], [rightX, rightY]] = [places[left], places[right]];
    // Average linkage never goes back to a stronger join, but rounding may.
    const joint = Math.min(x(alike), leftX, rightX);
    surface.path([[leftX, leftY], [joint, leftY], [joint, rightY], [rightX, rightY]], ink);
    places.push([joint, (leftY + rightY) / 2]);
  }
}

// Horizontal bars. rows: {label, parts: [[value, colour]], text, note, open}.
function barChart({ rows, legend = [], unit }) {
  const height = 17;
  const left = labelWidth(rows.map((row) => row.label)) + PAD;
  const top = legend.length ? 26 : 6;
  const length = 300;
  const largest = Math.max(...rows.map((row) => row.parts.reduce((sum, [value]) => sum + value, 0)), 1e-12);
  return {
    width: left + length + 90,
    height: top + rows.length * height + PAD,
    rows: rows.length,
    columns: 1,
    describe: (row) => `${rows[row].label}: ${rows[row].text}${unit ? ` ${unit}` : ""}${rows[row].note ?? ""}`,
    open: (row) => rows[row].open?.(),
    box: (row) => [left, top + row * height, length, height],
    find(x, y) {
      const row = Math.floor((y - top) / height);
      return row >= 0 && row < rows.length ? [row, 0] : null;
    },
    draw(surface, { text, quiet }) {
      let x = 0;
      for (const [name, colour] of legend) {
        surface.rect(x, 4, 12, 12, colour);
        surface.text(name, x + 17, 10, { colour: quiet });
        x += textWidth(name) + 34;
      }
      rows.forEach((row, position) => {
        const y = top + position * height;
        surface.text(fitted(row.label, LABEL - 8), left - 6, y + height / 2, { colour: text, align: "right" });
        let end = left;
        for (const [value, colour] of row.parts) {
          const wide = (length * value) / largest;
          surface.rect(end, y + 2, wide, height - 4, colour);
          end += wide;
        }
        surface.text(row.text, end + 5, y + height / 2, { colour: quiet, size: 11 });
      });
    },
  };
}

const DASHES = [[], [7, 4], [2, 3]];

// Curves over layers. series: {name, group, style, values}: a colour per group, a dash per style.
function lineChart({ series, y }) {
  const [width, height, left, top] = [620, 300, 54, 14 + 18 * series.length];
  const values = series.flatMap((each) => each.values).filter((value) => value !== null);
  const low = Math.min(0, ...values);
  const high = Math.max(...values, low + 1e-9);
  const count = series[0].values.length;
  const at = (position, value) => [
    left + ((width - left - 20) * position) / Math.max(1, count - 1),
    top + (height * (high - value)) / (high - low),
  ];
  const groups = [...new Set(series.map((each) => each.group))];
  const pen = ({ group, style }) => [PALETTE[groups.indexOf(group) % PALETTE.length], 2, DASHES[style]];
  return {
    width,
    height: top + height + 40,
    rows: series.length,
    columns: count,
    describe: (row, column) => `${series[row].name}, layer ${column}: ${number(series[row].values[column], 3)}`,
    box(row, column) {
      const [centre, middle] = at(column, series[row].values[column] ?? low);
      return [centre - 5, middle - 5, 10, 10];
    },
    find(pointX, pointY) {
      const column = Math.round(((pointX - left) * Math.max(1, count - 1)) / (width - left - 20));
      if (column < 0 || column >= count) return null;
      const distance = (each) => Math.abs(at(column, each.values[column] ?? Infinity)[1] - pointY);
      const row = series.reduce((best, each, here) => (distance(each) < distance(series[best]) ? here : best), 0);
      return [row, column];
    },
    draw(surface, { text, quiet, line }) {
      series.forEach((each, row) => {
        surface.path([[left, 10 + 18 * row], [left + 26, 10 + 18 * row]], ...pen(each));
        surface.text(each.name, left + 33, 10 + 18 * row, { colour: text });
      });
      for (let tick = 0; tick <= 4; tick += 1) {
        const value = low + ((high - low) * tick) / 4;
        surface.path([at(0, value), at(count - 1, value)], line);
        surface.text(number(value, 2), left - 6, at(0, value)[1], { colour: quiet, align: "right", size: 11 });
      }
      for (let layer = 0; layer < count; layer += Math.ceil(count / 12)) {
        surface.text(String(layer), at(layer, low)[0], top + height + 12, { colour: quiet, align: "center", size: 11 });
      }
      surface.text("Layer (0: embeddings)", left, top + height + 30, { colour: quiet });
      surface.text(y, 12, top + height / 2, { colour: quiet, align: "center", upright: true });
      for (const each of series) {
        const known = each.values.map((value, column) => [column, value]).filter(([, value]) => value !== null);
        surface.path(known.map(([column, value]) => at(column, value)), ...pen(each));
      }
    },
  };
}
