// ---- the choice of colors and their legend ----
function drawModes() {
  $('modes').hidden = modes.length < 2;
  $('modes').replaceChildren(...modes.map(mode => {
    const checked = mode === state.mode, onchange = () => show({ mode });
    return h('label', {}, h('input', { type: 'radio', name: 'mode', value: mode.id, checked, onchange }), h('span', {}, mode.label));
  }));
}
function scaleTicks() {  // [place from 0 to 1, text]: a share of the bound is linear, a total error logarithmic
  if (state.mode.id === 'share') return [[0, '0'], [CALM, CALM], [WARM, WARM], [1, comparing ? 'tolerance' : 'bound']];
  const [low, high] = totals, every = Math.ceil((high - low) / 5);
  return range(Math.floor((high - low) / every) + 1).map(i => [i * every / (high - low), `1e${low + i * every}`]);
}
function drawLegend() {
  root.dataset.mode = state.mode.id;
  const share = state.mode.id === 'share';
  const swatch = (look, text) => h('span', { class: 'swatch' }, h('i', { class: `cell ${look}` }), text);
  $('legend').replaceChildren(...[
    h('div', { class: 'scale' }, h('i', {}, share ? h('b', { class: 'warm' }) : ''), h('div', {}, scaleTicks().map(([at, text]) => h('span', { style: `left:${100 * at}%` }, text)))),
    swatch(share ? 'bad' : 'marked', 'out of bounds'),
    share && cells.some(cell => cell.bounded?.bound === 0) ? swatch('exact', 'exact, as required') : null,
    swatch('none', share || comparing ? 'not recorded' : 'no total error'),
    guilty ? swatch('blamed', `first ${fault} step`) : null].filter(Boolean));
}

// ---- the map ----
const places = [], rowHeads = [], columnHeads = [];  // the map's cells, places[row][column], and its headings
const gap = tag => wide ? h(tag, { class: 'gap' }) : null;  // an empty column between the tensors and the steps
const withGap = (cells, tag) => [cells.slice(0, wide), gap(tag), cells.slice(wide)];
function makeHead() {  // the names of the tensors and steps, and above them their blocks: weights, attn, mlp
  const groups = weights.length ? [{ name: 'weights', size: weights.length }] : [];
  for (const step of data.steps) {
    const name = step.includes('.') ? step.slice(0, step.indexOf('.')) : '';
    if (groups.at(-1)?.name === name) groups.at(-1).size++; else groups.push({ name, size: 1 });
  }
  const short = step => groups.length > 1 ? step.slice(step.indexOf('.') + 1) : step;
  const names = [...weights.map(shortTensor), ...data.steps.map(short)];
  columnHeads.push(...[...weights, ...data.steps].map((step, col) =>
    h('th', { scope: 'col', 'data-step': step }, h('span', {}, names[col]))));
  const above = groups.map(({ name, size }) => [h('th', { class: 'group', colspan: size, scope: 'colgroup' }, name),
    name === 'weights' ? gap('td') : null]);
  return h('thead', {}, groups.length > 1 ? h('tr', {}, h('td'), above) : null,
    h('tr', {}, h('th', { scope: 'col' }, h('span', {}, 'layer')), withGap(columnHeads, 'td')));
}
const spanOf = (row, col) => isWide(row) ? (isTensor(row, col) ? wide : columns - wide) : 1;  // columns that a cell covers
function makeRow(row) {
  const outside = isWide(row), layer = row - first, cols = colsOf(row);
  const rare = data.layers > 40 && layer % 5 ? 'dense' : null;  // in thin rows only every fifth layer has its number
  rowHeads.push(h('th', outside ? {} : { scope: 'row', 'aria-label': `layer ${layer}`, class: rare }, outside ? '' : layer));
  const made = cols.map(col => h('td', { tabindex: -1, 'data-row': row, 'data-col': col, colspan: outside ? spanOf(row, col) : null }));
  places.push(new Map(cols.map((col, i) => [col, made[i]])));
  const line = !outside ? withGap(made, 'td') : cols.length > 1 ? [made[0], gap('td'), made[1]] : [wide ? h('td', { colspan: wide + 1 }) : null, made];
  return h('tr', {}, data.layers ? rowHeads[row] : null, line);
}
function buildMap() {
  const widths = data.layers ? ['layers', ...weights.map(() => 'steps'), ...(wide ? [''] : []), ...data.steps.map(() => 'steps')].map(name => h('col', { class: name })) : [];
  const attributes = { role: 'grid', 'aria-label': 'Errors, layers by steps', class: data.layers ? null : 'list' };
  const table = h('table', attributes, h('colgroup', {}, widths), data.layers ? makeHead() : null, h('tbody', {}, range(rows).map(makeRow)));
  table.style.setProperty('--row', data.layers > 48 ? '13px' : '19px');
  table.style.setProperty('--gap', data.layers > 48 ? '1px' : '2px');
  const pick = event => {
    const found = event.target.closest('td[data-row]');
    return found && { row: +found.dataset.row, col: +found.dataset.col };
  };
  table.addEventListener('click', event => { if (pick(event)) show(pick(event), true); });
  table.addEventListener('keydown', moveByKey);
  table.addEventListener('pointermove', event => {
    const mouse = event.pointerType !== 'touch', at = mouse ? pick(event) : null, step = event.target.closest('th')?.dataset.step;
    if (at) tip(event, describe(at)); else if (mouse && step) tip(event, [step, ...explanation(step)].join('\n')); else tip();
  });
  table.addEventListener('pointerleave', () => tip());
  $('map').replaceChildren(table);
}
function shownText() {  // which pass and rank the map shows
  const parts = [], rank = views[state.view].rank;
  if (severalPasses) parts.push(state.pass === anyPass ? 'the worst of all passes' : passes[state.pass]);
  if (views.length > 1) parts.push(rank === 'worst' ? 'the worst of all ranks' : rankName(rank));
  if (parts.length > 1 && state.pass === anyPass && rank === 'worst') return 'Shown: the worst of all passes and ranks.';
  return parts.length ? `Shown: ${parts.join(', ')}.` : '';
}
function paintMap() {
  $('shown').replaceChildren(h('bdi', {}, shownText()));
  const [deep, deepest] = state.mode.id === 'total' ? INKS : [1, 1];
  for (let row = 0; row < rows; row++) for (const [col, td] of places[row]) {
    const cell = cellAt({ ...state, row, col }), { look, t, size } = tone(cell, state.mode);
    const onRamp = look === '' || look === 'marked';
    td.className = `cell ${look}`;
    td.classList.toggle('wide', isWide(row));
    td.classList.toggle('deep', onRamp && t > deep);
    td.classList.toggle('deepest', onRamp && t > deepest);
    td.classList.toggle('blamed', guilty !== null && cell === guilty);
    td.style.setProperty('--t', t.toFixed(3));
    const said = !cell ? 'not recorded' : cell.ok ? brief(size) : `out of bounds, ${brief(size)}`;
    td.setAttribute('aria-label', `${nameOf(row, col)}: ${said}`);
    const label = isTensor(row, col) ? shortTensor(stepOf(row, col)) : nameOf(row, col);
    if (isWide(row)) td.replaceChildren(h('span', { class: 'name' }, h('bdi', {}, label)),
      data.layers ? '' : h('i', {}, h('b', { class: `cell ${look}` })), h('span', { class: 'number' }, brief(size)));
  }
}
const placeAt = at => places[at.row].get(colOf(at.row, at.col));
function markSelection(before, focus) {
  const old = placeAt(before), now = placeAt(state);
  old.tabIndex = -1; old.removeAttribute('aria-selected');
  now.tabIndex = 0; now.setAttribute('aria-selected', 'true');
  for (const [at, on] of [[before, false], [state, true]]) {
    rowHeads[at.row].classList.toggle('here', on);
    if (!isWide(at.row)) columnHeads[at.col].classList.toggle('here', on);
  }
  if (focus) { now.focus({ preventScroll: true }); now.scrollIntoView({ block: 'nearest', inline: 'nearest' }); }
}
function moveByKey(event) {
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const row = clamp(state.row + move[0], 0, rows - 1), across = clamp(state.col + move[1], 0, columns - 1);
  if (!isWide(state.row)) show({ row, col: across }, true);
  else if (move[1]) show({ col: move[1] > 0 ? Math.max(state.col, wide) : Math.min(state.col, Math.max(0, wide - 1)) }, true);
  else show({ row }, true);  // keeps the column, for the next row
}
const outOfBounds = cell => cell.onlyTotal ? 'total error out of bounds' : 'out of bounds';
function describe(place) {
  const at = { ...state, ...place }, cell = cellAt(at);
  const said = explanation(stepOf(at.row, at.col));
  if (!cell) return [fullName(at), 'not recorded', ...said].join('\n');
  const lines = [`${fullName(at)}  ${rankName(cell.rank)}`];
  const told = (name, { relative, bound }) => `${name} ${brief(relative)}${bound == null ? '' : `, bound ${brief(bound)}`}`;
  if (cell.local) lines.push(told('local error', cell.local));
  if (cell.total) lines.push(told(comparing ? 'difference' : 'total error', cell.total));
  return lines.concat(cell.ok ? [] : [`✕ ${outOfBounds(cell)}`], said).join('\n');
}
function tip(event, text) {
  const box = $('tip');
  box.hidden = !event;
  if (!event) return;
  box.textContent = text;
  const x = clamp(event.clientX + 14, 4, innerWidth - box.offsetWidth - 4);
  const y = event.clientY + 18 + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 10 : event.clientY + 18;
  box.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
}
