// ---- the total error of the residual stream from block to block ----
const PASS_COLORS = '#3b74b8 #b0568f #1d9a8a #b98514 #7a6cc8 #4aa3cf'.split(' ');
const passColor = pass => PASS_COLORS[pass % PASS_COLORS.length];
const isResidual = step => /residual$/.test(step);

function growthLines() {  // for each pass its points {pass, row, col, x, y}: x counts layers, y is the error
  const named = range(columns).filter(col => col >= weights.length && isResidual(stepOf(first, col)));
  const cols = named.length ? named : [columns - 1];
  const start = data.before.indexOf('embed');
  return data.passes.map((name, pass) => {
    const points = [], add = (row, col, x) => {
      const y = cellAt({ ...state, pass, row, col })?.total?.relative;
      if (y !== null && y !== undefined) points.push({ pass, row, col, x, y });
    };
    if (start >= 0) add(start, wide, 0);
    for (let row = first; row < end; row++) cols.forEach((col, k) => add(row, col, row - first + (k + 1) / cols.length));
    return { name, pass, points };
  }).filter(line => line.points.length);
}
function growthScale(lines, height, top, bottom) {  // a log axis, with a row below it for zeros and one above it for NaN and inf
  const sizes = lines.flatMap(line => line.points.map(point => point.y)), logs = sizes.filter(y => y > 0 && y < Infinity).map(Math.log10);
  const zeros = sizes.includes(0), odd = sizes.some(y => !Number.isFinite(y));
  const low = logs.length ? Math.floor(Math.min(...logs)) : 0, high = logs.length ? Math.max(low + 1, Math.ceil(Math.max(...logs))) : 0;
  const upper = top + (odd ? 24 : 0), lower = height - bottom - (zeros && logs.length ? 26 : 0);
  const at = size => size === 0 ? height - bottom : !Number.isFinite(size) ? top
    : upper + (high - Math.log10(size)) / Math.max(1, high - low) * (lower - upper);
  const every = Math.max(1, Math.ceil((high - low) / 6)), ticks = [];
  if (logs.length) for (let d = low; d <= high; d += every) ticks.push([at(10 ** d), `1e${d}`]);
  if (zeros) ticks.push([height - bottom, '0']);
  if (odd) ticks.push([top, 'not finite']);
  return { at, ticks };
}
function drawGrowth() {
  const lines = data.layers && data.steps.length ? growthLines() : [];
  $('growth-section').hidden = !lines.some(line => line.points.length > 1);
  if ($('growth-section').hidden) return;
  const width = $('growth').clientWidth || 800, height = 250, left = 58, top = 26, bottom = 34;
  const right = 14 + 7.6 * Math.max(...lines.map(line => Math.min(line.name.length, 14)));
  const scale = growthScale(lines, height, top, bottom), x = layers => left + layers / data.layers * (width - left - right);
  const svg = s('svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': 'Total relative error of the residual stream, layer by layer' });
  svg.append(...range(data.layers).filter(layer => layer % 2).map(layer => s('rect', { class: 'band', x: x(layer), y: top,
    width: x(1) - x(0), height: height - top - bottom })));
  for (const [y, text] of scale.ticks) svg.append(s('line', { class: 'grid', x1: left, x2: width - right, y1: y, y2: y }),
    s('text', { class: 'soft', x: left - 8, y: y + 4, 'text-anchor': 'end' }, text));
  const every = [1, 2, 5, 10, 20, 50].find(n => data.layers / n * 30 < width - left - right) ?? 100;
  for (let layer = 0; layer < data.layers; layer += every)
    svg.append(s('text', { class: 'soft', x: x(layer + 0.5), y: height - 18, 'text-anchor': 'middle' }, layer));
  svg.append(s('text', { class: 'soft', x: (left + width - right) / 2, y: height - 3, 'text-anchor': 'middle' }, 'layer'));
  const selected = shownPass(state), many = lines.length > PASS_COLORS.length;
  const isNow = line => line.pass === selected, stroke = line => many && !isNow(line) ? 'var(--soft)' : passColor(line.pass);
  if (guilty && !isWide(guilty.row)) svg.append(...markFirst(x(guilty.row - first + 0.5), top, height - bottom, width));
  for (const line of [...lines].sort((a, b) => isNow(a) - isNow(b))) {  // the selected one on top
    const now = isNow(line) ? 'now' : many ? 'faint' : '';
    const path = line.points.map(p => `${x(p.x).toFixed(1)} ${scale.at(p.y).toFixed(1)}`).join('L');
    svg.append(s('path', { class: `curve ${now}`, stroke: stroke(line), d: `M${path}` }));
    const dots = line.points.filter(p => p.y === 0 || now !== 'faint' && line.points.length < 40);  // an error of zero always has its dot
    svg.append(...dots.map(p => s('circle', { class: `dot ${p.y === 0 ? 'zero' : ''}`, fill: stroke(line), stroke: stroke(line),
      cx: x(p.x), cy: scale.at(p.y), r: p.y === 0 || now === 'now' ? 3 : 2 })));
  }
  const named = line => !many || isNow(line);  // of many passes only the selected one gets a label
  const ends = lines.filter(named).map(line => ({ line, y: scale.at(line.points.at(-1).y) })).sort((a, b) => a.y - b.y);
  ends.forEach((end, i) => { if (i && end.y < ends[i - 1].y + 14) end.y = ends[i - 1].y + 14; });
  const over = Math.max(0, (ends.at(-1)?.y ?? 0) - (height - bottom));
  for (const { line, y } of ends) svg.append(s('text', { class: isNow(line) ? 'pass now' : 'pass', style: `fill:${passColor(line.pass)}`,
    x: width - right + 8, y: y + 4 - over }, line.name.slice(0, 14)));
  const near = event => {  // the nearest point of all lines
    const box = svg.getBoundingClientRect();
    const far = p => Math.hypot(x(p.x) - event.clientX + box.left, scale.at(p.y) - event.clientY + box.top);
    return lines.flatMap(line => line.points).reduce((best, p) => far(p) < far(best) ? p : best);
  };
  svg.addEventListener('pointermove', event => { const p = near(event); tip(event, describe(p)); });
  svg.addEventListener('pointerleave', () => tip());
  svg.addEventListener('click', event => { const p = near(event); show({ pass: p.pass, row: p.row, col: p.col }); });
  $('growth').replaceChildren(svg);
  $('growth-what').textContent = growthWords(lines);
}
function markFirst(x, top, bottom, width) {  // the layer of the first wrong step
  const after = x < width * 0.6, name = stepOf(guilty.row, guilty.col);
  const text = `layer ${guilty.row - first}: ${isTensor(guilty.row, guilty.col) ? shortTensor(name) : name} ${comparing ? 'differs' : 'is wrong'}`;
  return [s('line', { class: 'first', x1: x, x2: x, y1: top - 12, y2: bottom }),
    s('text', { class: 'first-name', x: x + (after ? 6 : -6), y: top - 10, 'text-anchor': after ? 'start' : 'end' }, text)];
}
function growthWords(lines) {
  const view = views[state.view].rank, residuals = data.steps.filter(isResidual);
  const places = lines.some(line => line.points[0].x === 0) ? ['the embedding'] : [];
  if (residuals.includes('attn.residual')) places.push('each attention block');
  if (residuals.includes('mlp.residual')) places.push('each MLP block');
  const what = residuals.length ? `residual stream after ${places.join(', ').replace(/, ([^,]*)$/, ' and $1')}` : `step ${data.steps.at(-1)} of each layer`;
  return `The ${comparing ? '' : 'total '}relative ${comparing ? 'difference' : 'error'} of the ${what}`
    + (view === 'worst' ? ', on the rank where it is largest.' : view !== null && data.tp > 1 ? `, on rank ${view}.` : '.');
}
