'use strict';
// ---- small tools: elements are made with text nodes only, so no string of the data is ever markup ----
const $ = id => document.getElementById(id);
const root = document.documentElement;

function make(space, tag, attributes, children) {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}
const h = (tag, attributes, ...children) => make(null, tag, attributes, children);
const s = (tag, attributes, ...children) => make('http://www.w3.org/2000/svg', tag, attributes, children);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const real = x => typeof x === 'string' ? { inf: Infinity, '-inf': -Infinity }[x] ?? NaN : x;  // JSON has no NaN
const icon = ok => s('svg', { viewBox: '0 0 14 14', 'aria-hidden': 'true' },
  s('path', { d: ok ? 'M2 7.5 5.5 11 12 3.5' : 'M3 3 11 11M11 3 3 11' }));
const breakable = text => text.split(/(?<=[./])/).flatMap(part => [part, h('wbr')]);  // long names break at dots

const plain = number => number.replace('+', '');  // 1e+5 is 1e5
function brief(x) {  // an error: 3.1e-7
  if (x === null || x === undefined) return '–';
  if (!Number.isFinite(x)) return Number.isNaN(x) ? 'NaN' : x > 0 ? 'inf' : '-inf';
  return x !== 0 && (Math.abs(x) < 0.01 || Math.abs(x) >= 1e4) ? plain(x.toExponential(1)) : String(+x.toPrecision(2));
}
function full(x) {  // an element of a tensor
  if (x === null || x === undefined || !Number.isFinite(x)) return brief(x);
  return x !== 0 && (Math.abs(x) < 1e-4 || Math.abs(x) >= 1e7) ? plain(x.toExponential(4)) : String(+x.toPrecision(7));
}
const count = n => String(n).replace(/\B(?=(\d{3})+$)/g, '\u202f');
const plural = (n, one) => `${count(n)} ${one}${n === 1 ? '' : 's'}`;

// ---- the data ----
const data = JSON.parse($('data').textContent);
const comparing = data.command === 'compare', fault = comparing ? 'differing' : 'wrong';
const first = data.before.length, end = first + data.layers, rows = end + data.after.length;
const columns = Math.max(1, data.steps.length);
const isWide = row => row < first || row >= end;
const stepOf = (row, col) => !isWide(row) ? data.steps[col] : row < first ? data.before[row] : data.after[row - end];
const nameOf = (row, col) => isWide(row) ? stepOf(row, col) : `layers.${row - first}.${stepOf(row, col)}`;
const fullName = at => (data.passes[at.pass] ? data.passes[at.pass] + '/' : '') + nameOf(at.row, at.col);
const rankName = rank => rank === null ? (data.tp ? 'all ranks' : '') : `rank ${rank}`;

function openError(packed) {
  if (!packed) return null;
  const [relative, bound, absolute, absoluteBound, index] = packed.map(real);
  // The larger share of the two bounds; an error of 0 is no share of any bound, and any other error exceeds a bound of 0.
  const shares = [[relative, bound], [absolute, absoluteBound]].filter(pair => !pair.includes(null))
    .map(([error, most]) => error === 0 ? 0 : error / most);
  const share = shares.length ? Math.max(...shares) : null;
  return { relative, bound, absolute, absoluteBound, index, share };
}
const cells = data.cells.map(([pass, row, col, rank, kind, ok, local, total, worst, note]) => {
  const cell = { pass, row, col, rank, kind, ok: ok === 1, local: openError(local), total: openError(total), worst, note };
  cell.bounded = cell.local ?? (cell.total?.bound != null ? cell.total : null);  // the error that has the bound
  return cell;
});
// The position of a cell in the run. All ranks compute a step at the same time, so they are ordered by number.
const order = ({ pass, row, col, rank }) => ((pass * rows + row) * columns + (isWide(row) ? 0 : col)) * (data.tp ?? 1) + (rank ?? 0);
const wrong = cells.filter(cell => !cell.ok).sort((a, b) => order(a) - order(b));
const modes = [
  { id: 'share', label: comparing ? 'Difference / tolerance' : 'Local error / bound',
    of: cell => cell.bounded?.share ?? null },
  { id: 'total', label: comparing ? 'Relative difference' : 'Total error',
    of: cell => cell.total?.relative ?? null },
].filter(mode => cells.some(cell => mode.of(cell) !== null));
if (!modes.length) modes.push({ id: 'share', label: 'Within bounds', of: () => null });

function decades(of, widest) {  // the range of a log scale: all but the smallest few values, and not too wide
  const sizes = cells.map(of).filter(x => x > 0 && x < Infinity).sort((a, b) => a - b);
  if (!sizes.length) return [-widest, 0];
  const high = Math.min(2, Math.ceil(Math.log10(sizes.at(-1))));
  return [clamp(Math.floor(Math.log10(sizes[Math.floor(sizes.length / 50)])), high - widest, high - 1), high];
}
const totals = decades(cell => cell.total?.relative, 10);
const CALM = 0.6, WARM = 0.8;  // shares of the bound: below CALM an error is far from it, and above WARM the color is warm
const INKS = [0.5, 0.65];  // places on the ramp of total errors from which text has the colors for dark and darkest cells

// Views: each rank alone and, if there are several, the worst rank of each step.
const range = n => Array.from({ length: n }, (_, i) => i);
const views = data.tp ? range(data.tp).map(rank => ({ rank, label: String(rank) })) : [{ rank: null, label: '' }];
if (data.tp > 1) views.unshift({ rank: 'worst', label: 'worst' });

function severity(cell, mode) {  // a wrong step is worse than any step within bounds; NaN is worst
  const size = mode.of(cell) ?? -1;
  return (cell.ok || mode.id === 'total' ? 0 : 1e6) + (Number.isNaN(size) ? Infinity : size);
}
function arrange(mode) {  // for each pass and view, the number of the cell at each place of the map, or -1
  const grids = data.passes.map(() => views.map(() => new Int32Array(rows * columns).fill(-1)));
  cells.forEach((cell, i) => views.forEach((view, v) => {
    const grid = grids[cell.pass][v], place = cell.row * columns + cell.col;
    if (view.rank === 'worst') {
      if (grid[place] < 0 || severity(cell, mode) > severity(cells[grid[place]], mode)) grid[place] = i;
    } else if (view.rank === null || cell.rank === null || cell.rank === view.rank) grid[place] = i;
  }));
  return grids;
}
const arranged = new Map(modes.map(mode => [mode.id, arrange(mode)]));
function cellAt(at) {
  const grid = arranged.get(at.mode.id)[at.pass]?.[at.view];
  return cells[grid?.[at.row * columns + (isWide(at.row) ? 0 : at.col)] ?? -1];
}

function tone(cell, mode) {  // how a cell is drawn: its class, its place on the ramp, and its number
  if (!cell) return { look: 'none', t: 0, size: null };
  const size = mode.of(cell);
  if (mode.id === 'share' && !cell.ok) return { look: 'bad', t: 1, size };
  if (size === null) return { look: 'none', t: 0, size };
  if (!Number.isFinite(size)) return { look: 'bad', t: 1, size };
  if (mode.id === 'share' && cell.bounded.bound === 0) return { look: 'exact', t: 0, size };
  if (mode.id === 'share' && cell.ok)
    return size > WARM ? { look: 'warm', t: (size - WARM) / (1 - WARM), size } : { look: '', t: size / WARM, size };
  const [low, high] = totals, t = size > 0 ? clamp((Math.log10(size) - low) / (high - low), 0, 1) : 0;
  return { look: cell.ok ? '' : 'marked', t, size };
}

// ---- what is shown now ----
const closest = cells.reduce((best, cell) => !best || severity(cell, modes[0]) > severity(best, modes[0]) ? cell : best, null);
const guilty = cells[data.blamed ?? -1] ?? null;
const state = { mode: modes[0], pass: 0, view: 0, row: 0, col: 0 };
const viewOf = cell => Math.max(0, views.findIndex(view => view.rank === cell.rank));
const placeOf = ({ pass, row, col }) => ({ pass, row, col });

function show(changes, focus = false) {
  const before = { ...state };
  Object.assign(state, changes);
  if (state.mode !== before.mode) { drawModes(); drawLegend(); drawThumbs(); }
  if (['mode', 'pass', 'view'].some(key => state[key] !== before[key])) { paintMap(); drawGrowth(); }
  markSelection(before, focus);
  markLayer();
  drawDetail();
}
