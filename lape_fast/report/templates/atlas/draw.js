// Drawing once for two outputs: a canvas on the page, and SVG for the export.

const FONT = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
// More pixels than this are more than some phones' browsers draw.
const MOST_PIXELS = 16e6;

// Stops of viridis: dark to light evenly, and told apart with any kind of colour vision.
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
// From blue over white to red, as ColorBrewer's RdBu.
const DIVERGING = ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"];
// Blue, vermillion, green, purple, orange, sky blue of Okabe and Ito.
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

function blend(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const left = Math.min(Math.floor(place), stops.length - 2);
  const mix = place - left;
  const channel = (colour, position) => parseInt(colour.slice(position, position + 2), 16);
  const mixed = [1, 3, 5].map((position) =>
    Math.round((1 - mix) * channel(stops[left], position) + mix * channel(stops[left + 1], position)),
  );
  return `rgb(${mixed.join(",")})`;
}

// The page's own colours, light or dark.
function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return { text: colour("text"), quiet: colour("quiet"), line: colour("line"), page: colour("page"), none: colour("band") };
}

class CanvasSurface {
  constructor(canvas, width, height) {
    const scale = Math.min(window.devicePixelRatio || 1, Math.sqrt(MOST_PIXELS / (width * height)));
    canvas.width = Math.ceil(width * scale);
    canvas.height = Math.ceil(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    this.context = canvas.getContext("2d");
    this.context.scale(scale, scale);
  }
  rect(x, y, width, height, colour) {
    this.context.fillStyle = colour;
    this.context.fillRect(x, y, width, height);
  }
  path(points, colour, width = 1, dash = []) {
    this.context.strokeStyle = colour;
    this.context.lineWidth = width;
    this.context.setLineDash(dash);
    this.context.beginPath();
    points.forEach(([x, y], position) => (position ? this.context.lineTo(x, y) : this.context.moveTo(x, y)));
    this.context.stroke();
  }
  text(string, x, y, { colour, size = 12, align = "left", upright = false } = {}) {
    this.context.save();
    this.context.translate(x, y);
    if (upright) this.context.rotate(-Math.PI / 2);
    this.context.font = `${size}px ${FONT}`;
    this.context.fillStyle = colour;
    this.context.textAlign = align;
    this.context.textBaseline = "middle";
    this.context.fillText(string, 0, 0);
    this.context.restore();
  }
}

const escaped = (text) =>
  String(text)
    // What XML cannot hold.
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, " ")
    .replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
const short = (value) => Number(value.toFixed(2));

class SvgSurface {
  constructor(width, height) {
    this.parts = [];
    this.size = [Math.ceil(width), Math.ceil(height)];
  }
  rect(x, y, width, height, colour) {
    this.parts.push(
      `<rect x="${short(x)}" y="${short(y)}" width="${short(width)}" height="${short(height)}" fill="${colour}"/>`,
    );
  }
  path(points, colour, width = 1, dash = []) {
    const line = points.map((point) => point.map(short).join(",")).join(" ");
    const dashes = dash.length ? ` stroke-dasharray="${dash.join(" ")}"` : "";
    this.parts.push(`<polyline points="${line}" fill="none" stroke="${colour}" stroke-width="${width}"${dashes}/>`);
  }
  text(string, x, y, { colour, size = 12, align = "left", upright = false } = {}) {
    const anchor = { left: "start", center: "middle", right: "end" }[align];
    const turn = upright ? " rotate(-90)" : "";
    this.parts.push(
      `<text transform="translate(${short(x)} ${short(y)})${turn}" font-size="${size}" text-anchor="${anchor}" ` +
        `dominant-baseline="central" fill="${colour}">${escaped(string)}</text>`,
    );
  }
  toString() {
    const [width, height] = this.size;
    return (
      `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" ` +
      `font-family="${escaped(FONT)}">${this.parts.join("")}</svg>\n`
    );
  }
}

let measuring;
function textWidth(string, size = 12) {
  measuring ??= document.createElement("canvas").getContext("2d");
  measuring.font = `${size}px ${FONT}`;
  return measuring.measureText(string).width;
}
// Text that fits, with an ellipsis where it was cut.
function fitted(string, width, size = 12) {
  if (textWidth(string, size) <= width) return string;
  let length = Math.max(1, Math.floor((string.length * width) / textWidth(string, size)));
  while (length > 1 && textWidth(`${string.slice(0, length)}…`, size) > width) length -= 1;
  return `${string.slice(0, length)}…`;
}
