// ---- the numbers of one step ----
const td = (content, attributes) => h('td', attributes, h('bdi', {}, content));
const headings = names => h('thead', {}, h('tr', {}, names.map(name => h('th', { scope: 'col' }, name))));
const indexText = index => index?.join(', ') || '–';

function errorTable(cell) {
  const errors = [['local', cell.local], [comparing ? 'difference' : 'total', cell.total]].filter(([, error]) => error);
  const lines = [
    ['relative error', error => brief(error.relative)], ['its bound', error => brief(error.bound)],
    ['share of its bound', error => brief(error.share)], ['largest absolute', error => brief(error.absolute)],
    ['its bound', error => brief(error.absoluteBound)], ['at index', error => indexText(error.index)],
  ].map(([label, text]) => [label, errors.map(([, error]) => text(error))]);
  const told = lines.filter(([, texts]) => texts.some(text => text !== '–'));
  return h('table', {}, headings(['', ...errors.map(([name]) => name)]), h('tbody', {},
    told.map(([label, texts]) => h('tr', {}, h('th', { scope: 'row' }, label), texts.map(text => td(text))))));
}
function worstTable(cell) {
  const axes = data.axes[stepOf(cell.row, cell.col)]?.split(' ');
  const lines = cell.worst.map(([index, value, expected]) => h('tr', {}, td(indexText(index)), td(full(real(value))),
    td(full(real(expected))), td(brief(real(value) - real(expected)))));
  return [h('h3', {}, 'Worst elements'), h('div', { class: 'scroll' }, h('table', {},
    headings([axes ? `[${axes.join(', ')}]` : 'index', ...(comparing ? ['B', 'A'] : ['value', 'expected']), 'difference']), h('tbody', {}, lines)))];
}
function ranksTable() {
  const shown = cellAt(state), lines = views.flatMap((view, v) => {
    const cell = view.rank === 'worst' ? null : cellAt({ ...state, view: v });
    if (!cell) return [];
    const button = h('button', { type: 'button', 'aria-label': `show rank ${view.rank}`, onclick: () => show({ view: v }) }, view.label);
    return h('tr', { class: cell === shown ? 'here' : null }, h('td', {}, button), td(brief(cell.local?.relative)),
      td(brief(cell.bounded?.share)), td(brief(cell.total?.relative)), td(cell.ok ? '✓' : '✕', { class: cell.ok ? 'ok' : 'wrong' }));
  });
  if (lines.length < 2) return [];
  return [h('h3', {}, 'The same step on each rank'),
    h('table', {}, headings(['rank', 'local', 'of bound', 'total', '']), h('tbody', {}, lines))];
}
function wrongButtons() {  // to the wrong steps before and behind this one
  const here = order({ ...state, rank: cellAt(state)?.rank });
  const before = wrong.findLast(cell => order(cell) < here), after = wrong.find(cell => order(cell) > here);
  const button = (cell, text) => h('button', { type: 'button', disabled: cell ? null : '',
    onclick: () => show({ ...placeOf(cell), view: viewOf(cell) }, true) }, text);
  if (!before && !after) return [];
  return [h('div', { class: 'steps' }, button(before, '‹ previous wrong'), button(after, 'next wrong ›'))];
}
function drawDetail() {
  const cell = cellAt(state), title = h('h2', { class: 'name' }, h('bdi', {}, breakable(fullName(state))));
  if (!cell) return $('detail').replaceChildren(title, h('p', { class: 'soft' }, 'Not recorded.'), ...wrongButtons());
  const status = cell.ok ? '✓ within bounds' : cell === guilty ? `✕ the first ${fault} step` : '✕ out of bounds';
  const rank = rankName(cell.rank) + (views[state.view].rank === 'worst' ? ' (the worst)' : '');
  $('detail').replaceChildren(title,
    h('p', { class: 'tags' }, h('span', { class: cell.ok ? 'ok' : 'wrong' }, status), h('span', {}, rank),
      h('span', { class: 'soft' }, h('bdi', {}, cell.kind))),
    cell.note ? h('p', { class: 'note' }, h('bdi', {}, cell.note)) : '',
    h('h3', {}, 'Errors'), errorTable(cell), ...(cell.worst.length ? worstTable(cell) : []), ...ranksTable(), ...wrongButtons(),
    h('p', { class: 'hint' }, 'Arrow keys move through the map.'));
}

// ---- the total error of the residual stream, layer by layer ----
function growthLines() {  // for each pass, its points: {row, col, x in layers, y the error}
  const named = data.steps.map((step, col) => col).filter(col => /residual$/.test(data.steps[col]));
  const cols = named.length ? named : [columns - 1];
  return data.passes.map((name, pass) => {
    const points = [];
    for (let row = first; row < behind; row++) for (const [k, col] of cols.entries()) {
      const y = cellAt({ ...state, pass, row, col })?.total?.relative;
      if (y > 0 && y < Infinity) points.push({ pass, row, col, x: row - first + (k + 1) / cols.length, y });
    }
    return { name, pass, points };
  }).filter(line => line.points.length > 1);
}
function drawGrowth() {
  const lines = data.layers ? growthLines() : [];
  $('growth-section').hidden = !lines.length;
  if (!lines.length) return;
  const width = $('growth').clientWidth || 800, height = 230, left = 44, right = 78, top = 10, bottom = 34;
  const all = lines.flatMap(line => line.points.map(point => Math.log10(point.y)));
  const low = Math.floor(Math.min(...all)), high = Math.max(low + 1, Math.ceil(Math.max(...all)));
  const x = layers => left + layers / data.layers * (width - left - right);
  const y = size => top + (high - Math.log10(size)) / (high - low) * (height - top - bottom);
  const svg = s('svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': 'Total relative error of the residual stream, layer by layer' });
  for (let d = low, every = Math.ceil((high - low) / 6); d <= high; d += every)
    svg.append(s('line', { class: 'grid', x1: left, x2: width - right, y1: y(10 ** d), y2: y(10 ** d) }),
      s('text', { class: 'soft', x: left - 8, y: y(10 ** d) + 4, 'text-anchor': 'end' }, `1e${d}`));
  const every = [1, 2, 5, 10, 20, 50].find(n => data.layers / n * 30 < width - left - right) ?? 100;
  for (let layer = 0; layer < data.layers; layer += every)
    svg.append(s('text', { class: 'soft', x: x(layer + 0.5), y: height - 18, 'text-anchor': 'middle' }, layer));
  svg.append(s('text', { class: 'soft', x: (left + width - right) / 2, y: height - 4, 'text-anchor': 'middle' }, 'layer'));
  if (guilty && !isWide(guilty.row)) {
    const at = x(guilty.row - first + 0.5);
    svg.append(s('line', { class: 'first', x1: at, x2: at, y1: top, y2: height - bottom }));
  }
  const named = line => lines.length <= 6 || line.pass === state.pass;  // of many, only the one that is looked at
  const ends = lines.filter(named).map(line => ({ line, y: y(line.points.at(-1).y) })).sort((a, b) => a.y - b.y);
  ends.forEach((end, i) => { if (i && end.y < ends[i - 1].y + 14) end.y = ends[i - 1].y + 14; });  // labels side by side
  for (const line of lines) {
    const d = line.points.map(p => `${x(p.x).toFixed(1)} ${y(p.y).toFixed(1)}`).join('L');
    svg.append(s('path', { class: `curve ${line.pass === state.pass ? 'now' : ''}`, d: `M${d}` }));
  }
  for (const { line, y: at } of ends)
    svg.append(s('text', { class: line.pass === state.pass ? '' : 'soft', x: x(data.layers) + 8, y: at + 4 }, line.name));
  const near = event => {  // the nearest point of all lines
    const box = svg.getBoundingClientRect();
    const far = p => Math.hypot(x(p.x) - event.clientX + box.left, y(p.y) - event.clientY + box.top);
    return lines.flatMap(line => line.points).reduce((best, p) => far(p) < far(best) ? p : best);
  };
  svg.addEventListener('pointermove', event => { const p = near(event); tip(event, describe(p)); });
  svg.addEventListener('pointerleave', () => tip());
  svg.addEventListener('click', event => { const p = near(event); show({ pass: p.pass, row: p.row, col: p.col }); });
  $('growth').replaceChildren(svg);
  const view = views[state.view].rank;
  $('growth-what').textContent = `The ${comparing ? '' : 'total '}relative error of the residual stream after each layer`
    + (view === 'worst' ? ', the worst of the ranks' : view !== null && data.tp > 1 ? `, on rank ${view}` : '')
    + (guilty && !isWide(guilty.row) ? '; the dashed line marks the layer of the first ' + fault + ' step.' : '.');
}
